"""A thinking budget on a real engine: the text after the cut reasoning equals the answer to that text as a prompt."""

from __future__ import annotations

import json
from pathlib import Path

from server.chat import encode_chat
from server.chat.deepseek_v32 import DeepSeekV32
from tests.e2e.serving import Server
from tests.engine.kit import tiny_checkpoint
from tests.server.chat.kit import EOS, TOKENS, VOCABULARY, ids

BUDGET, LIMIT = 70, 90  # the reasoning fills a page, which the continuation reuses


def test_a_thinking_budget(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, vocab_size=256 + len(TOKENS), bos_token_id=256, eos_token_id=257)
    VOCABULARY._backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": EOS, "bos_token": TOKENS[0]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    server = Server(
        str(tmp_path), "--chat-format", "deepseek-v3.2", "--served-model-name", "tiny",
        "--dtype", "float32", "--device", "cpu", "--threads", "1", "--kv-cache-memory", "16MiB",
    )  # fmt: skip
    try:
        server.wait_ready()
        assert "chat format: deepseek-v3.2 (as set)" in server.errors
        bytes_only = {str(token_id): -100.0 for token_id in range(256, 256 + len(TOKENS))}
        common = {"model": "tiny", "temperature": 0, "logit_bias": bytes_only}
        messages = [{"role": "user", "content": "?"}]
        chat = server.post(
            "/v1/chat/completions", **common, messages=messages, max_tokens=LIMIT, logprobs=True,
            thinking={"type": "enabled", "budget_tokens": BUDGET},
        ).json()  # fmt: skip
        assert chat["usage"]["completion_tokens"] == LIMIT
        assert chat["usage"]["completion_tokens_details"]["reasoning_tokens"] == BUDGET
        choice = chat["choices"][0]
        assert choice["finish_reason"] == "length"
        by_bytes = {tuple(VOCABULARY.token_bytes(token_id)): token_id for token_id in range(256)}
        thought = [by_bytes[tuple(token["bytes"])] for token in choice["logprobs"]["content"][:BUDGET]]
        assert VOCABULARY.decode(thought) == choice["message"]["reasoning_content"]
        prompt = encode_chat(DeepSeekV32(), VOCABULARY, messages, thinking=True)
        rest = server.post(
            "/v1/completions", **common, prompt=[*prompt, *thought, *ids("</think>")],
            max_tokens=LIMIT - BUDGET - 1,
        ).json()  # fmt: skip
        assert rest["choices"][0]["text"] == choice["message"]["content"]
        assert rest["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    finally:
        server.close()
