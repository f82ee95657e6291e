# `make serve` is all it takes. What it installs is pinned in constraints.txt and lands in .venv, once:
# a stamp file remembers, so that the next start needs no network.

PYTHON ?= python3
PORT ?= 8000
MODEL ?=
ARGS ?=

# 1 installs what an NVIDIA GPU needs beside torch, 0 does not. Without a word it is 1 on a machine that has such a GPU.
HAS_GPU = $(shell if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo 1; else echo 0; fi)
ifeq ($(origin GPU),undefined)
GPU := $(HAS_GPU)
else
GPU_CHECK := --strict
endif
ifeq ($(filter 0 1,$(GPU)),)
$(error GPU is "$(GPU)"; set it to 1 or 0, or leave it out)
endif

# The tests of one file, which share what they set up, stay on one worker.
WORKERS := --numprocesses=2 --dist=loadfile

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# setuptools warns on every editable install; the rest of what pip has to say is let through.
INSTALL := PYTHONWARNINGS=ignore $(PIP) install --quiet --constraint constraints.txt

READY := $(VENV)/.installed$(if $(filter 1,$(GPU)),-gpu)

.DEFAULT_GOAL := help
.PHONY: help serve chat install check test test-slow test-all lint clean

help: ## Show what there is.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

serve: $(READY) ## Serve a model. PORT=8000, MODEL=name or path, GPU=0 or 1, ARGS="more flags of dsa serve".
	@exec $(BIN)/dsa serve $(MODEL) --port $(PORT) $(ARGS)

chat: $(VENV)/.installed ## Talk to the server that runs on PORT.
	@exec $(BIN)/dsa chat --url http://127.0.0.1:$(PORT) $(ARGS)

install: $(READY) ## Install what `make serve` needs, and start nothing.

check: $(VENV)/.installed-lint ## In a minute: style, types, and the tests that need no model and no process.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest $(WORKERS) --hypothesis-profile=check --ignore=tests/e2e --ignore=tests/deploy --ignore=tests/engine/kernels/triton -m "not (slow or model or process or interpreted)" $(ARGS)

test: $(VENV)/.installed-test ## Run the tests. ARGS="more flags of pytest".
	@$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-slow: $(VENV)/.installed-test ## Run only the long proofs.
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-all: $(VENV)/.installed-test ## Run the tests and the long proofs.
	@$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: $(VENV)/.installed-lint ## Check style, types and the Dockerfile.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

clean: ## Remove what make made here; fetched models stay in the cache.
	rm -rf $(VENV) build dist engine/kernels/native/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment with the pinned pip and build tools (ziglang brings the C compiler).
$(VENV)/.created: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip setuptools ziglang
	@touch $@

# torch first and alone, so that no range of another package chooses the build. The last step compiles the native
# kernels, which is why their sources count.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py $(wildcard engine/kernels/native/*.[ch])
	@echo "installing what dsa needs, once; torch is large"
	@$(INSTALL) torch
	@$(INSTALL) --no-build-isolation --editable '.[otel]'
	@touch $@

# A CUDA build of torch has brought Triton. Which build it is, is up to pip's index: one without CUDA is told here, and is an
# error if GPU=1 was asked for.
$(VENV)/.installed-gpu: $(VENV)/.installed
	@echo "installing what an NVIDIA GPU needs, once; GPU=0 leaves it out"
	@$(BIN)/python -P -c 'import triton' 2>/dev/null || $(INSTALL) --no-build-isolation --editable '.[gpu]'
	@$(BIN)/python -P -m lab.doctor.software $(GPU_CHECK)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need, once"
	@$(INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

# The type checker looks into the tests' libraries too.
$(VENV)/.installed-lint: $(VENV)/.installed-test
	@echo "installing what the checks need, once"
	@$(INSTALL) --no-build-isolation --editable '.[lint]'
	@touch $@
