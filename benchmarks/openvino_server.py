"""Serves one model by OpenVINO GenAI behind `/v1/completions`, for `benchmarks.compare`: OpenVINO GenAI has no server itself.

`OPENVINO_PYTHON benchmarks/openvino_server.py --model FILE.gguf --port N`. It needs `openvino-genai` and the standard library
only, because that package lives in an environment of its own. One request at a time; prompts are token ids. Each token is
an event of its own, sent when OpenVINO hands it over, and is not made into text: what is measured is the model.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Protocol


class Pipeline(Protocol):
    """What makes tokens: OpenVINO GenAI, or a test's."""

    def answer(self, prompt: list[int], max_tokens: int, say: Any) -> None:
        """Continue a prompt greedily past the end of the text by `max_tokens` tokens; call `say` with each list of new tokens."""
        ...


class OpenVino:
    """A model on the CPU, read by OpenVINO GenAI.

    Args:
        model: a .gguf file, or a folder of OpenVINO's own
        threads: of the CPU
        round_activations: to 8 bits, as OpenVINO does by default; else they stay floating-point numbers
    """

    def __init__(self, model: str, threads: int, round_activations: bool = True) -> None:
        import openvino_genai as genai  # type: ignore[import-not-found, unused-ignore]

        self._genai = genai
        more = {} if round_activations else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        self._pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, **more)

    def answer(self, prompt: list[int], max_tokens: int, say: Any) -> None:
        """See `Pipeline`."""
        import numpy as np
        from openvino import Tensor  # type: ignore[import-not-found, unused-ignore]

        genai = self._genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined, unused-ignore]
            def write(self, token: Any) -> Any:
                say([token] if isinstance(token, int) else list(token))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens = max_tokens, max_tokens
        config.do_sample, config.ignore_eos = False, True
        ids = Tensor(np.array([prompt], np.int64))
        ones = Tensor(np.ones((1, len(prompt)), np.int64))
        self._pipeline.generate(genai.TokenizedInputs(ids, ones), config, Streamer())


class Handler(BaseHTTPRequestHandler):
    """The two endpoints that `dsa bench` asks."""

    protocol_version = "HTTP/1.1"
    pipeline: Pipeline
    name = "openvino"

    def do_GET(self) -> None:
        """Answer /v1/models, and any other path with 200: the model is loaded."""
        self._whole(200, {"object": "list", "data": [{"id": self.name, "object": "model"}]})

    def do_POST(self) -> None:
        """Stream a completion."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, most = body.get("prompt"), body.get("max_tokens")
        ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
        if self.path != "/v1/completions" or not (ids and prompt and body.get("stream") and most):
            self._whole(400, {"error": {"message": "only streamed /v1/completions with token ids are here"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        made = 0

        def say(tokens: list[int]) -> None:
            nonlocal made
            made += len(tokens)
            for token in tokens:
                self._event({"choices": [{"index": 0, "text": f"{token} ", "finish_reason": None}]})

        self.pipeline.answer(prompt, most, say)
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no line for each request."""

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _whole(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def serve(pipeline: Pipeline, port: int) -> HTTPServer:
    """Return a server of the pipeline on the loopback, not yet running."""
    handler = type("Own", (Handler,), {"pipeline": pipeline})
    return HTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """Load the model, then serve it for ever."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--no-dynamic-quantisation", action="store_true", help="do not round activations to 8 bits"
    )
    options = parser.parse_args()
    pipeline = OpenVino(options.model, options.threads, not options.no_dynamic_quantisation)
    serve(pipeline, options.port).serve_forever()


if __name__ == "__main__":
    main()
