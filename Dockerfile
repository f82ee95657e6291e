# docker build --tag dsa-serve .
# docker run --publish 8000:8000 --volume dsa-models:/models dsa-serve
#
# For NVIDIA GPUs: --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04, and `docker run --gpus all`. Such a base brings in
# what a GPU needs; --build-arg GPU=1 does it on any base, and GPU=0 leaves it out.
# A pip configuration (a mirror, a certificate) goes in as a secret that stays out of the image:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf .
ARG BASE=python:3.11-slim
ARG GPU=auto

FROM ${BASE} AS base
ARG GPU
# Bases without Python (NVIDIA's) get their distribution's, of whatever patch version it has. gcc and Python's headers are
# what Triton compiles the launchers of its kernels with. Only NVIDIA's bases have CUDA_VERSION.
# hadolint ignore=DL3008
RUN set -- \
    && if ! command -v python3 > /dev/null; then set -- python3 python3-dev python3-venv; fi \
    && if [ "${GPU}" = 1 ] || { [ "${GPU}" = auto ] && [ -n "${CUDA_VERSION:-}" ]; }; then set -- "$@" gcc libc6-dev; fi \
    && if [ "$#" -gt 0 ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends "$@" \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
ARG GPU
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/dsa/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# The same steps as the Makefile's: the pinned pip and build tools, torch alone, then everything else.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/dsa \
    && pip install --constraint constraints.txt --upgrade pip setuptools ziglang \
    && pip install --constraint constraints.txt torch
COPY pyproject.toml setup.py LICENSE NOTICE ./
COPY engine engine
COPY lab lab
COPY server server
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    extras=otel \
    && if [ "${GPU}" = 1 ] || { [ "${GPU}" = auto ] && [ -n "${CUDA_VERSION:-}" ]; }; then extras=otel,gpu; fi \
    && pip install --constraint constraints.txt --no-build-isolation ".[${extras}]" \
    && if [ "${extras}" != otel ]; then python -P -m lab.doctor.software --strict; fi \
    && pip uninstall --yes ziglang

FROM base
# Name a model here to have it in the image: --build-arg PULL=smollm2-135m-instruct
ARG PULL=""
ENV PATH=/opt/dsa/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DSA_CACHE=/models \
    HF_HOME=/models/huggingface \
    DSA_HOST=0.0.0.0 \
    DSA_PORT=8000
RUN useradd --system --uid 10001 --create-home dsa \
    && mkdir /models /ledger \
    && chown dsa /models /ledger
COPY --from=build /opt/dsa /opt/dsa
USER 10001
WORKDIR /home/dsa
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,uid=10001 \
    if [ -n "${PULL}" ]; then dsa pull "${PULL}"; fi
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"DSA_PORT\"]}/health/ready', timeout=4)"]
ENTRYPOINT ["dsa"]
CMD ["serve"]
