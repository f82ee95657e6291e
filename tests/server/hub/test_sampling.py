"""The defaults of sampling that come with a model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from server.config import SamplingDefaults
from server.hub.catalogue import DEFAULT_MODEL
from server.hub.sampling import NAMED, read_sampling
from tests.server.fake_engine import FakeEngine
from tests.server.kit import MODEL, chat_body, client, make_app, speaking


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"temperature": 0, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"min_p": 0.1, "eos_token_id": 2}, {"min_p": 0.1}),
        ({"temperature": "hot", "top_p": 7, "top_k": True, "min_p": None}, {}),
        ({}, {}),
    ],
)
def test_of_a_folder(tmp_path: Path, given: dict[str, Any], read: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert read_sampling(tmp_path, "any") == SamplingDefaults(**read)


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    assert read_sampling(tmp_path, "any") == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text("[")
    assert read_sampling(tmp_path, "any") == SamplingDefaults()


def gguf(path: Path, **values: float) -> Path:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for key, value in values.items():
        name = f"general.sampling.{key}".encode()
        data += struct.pack("<Q", len(name)) + name + struct.pack("<If", 6, value)
    path.write_bytes(data)
    return path


def test_of_a_gguf_file(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf", temp=0.5, penalty_repeat=1.25, top_k=40)
    read = read_sampling(path, DEFAULT_MODEL)
    assert read == SamplingDefaults(temperature=0.5, repetition_penalty=1.25, top_k=40)
    assert read_sampling(gguf(tmp_path / "y.gguf"), DEFAULT_MODEL) == NAMED[DEFAULT_MODEL]
    assert read_sampling(tmp_path / "y.gguf", "another") == SamplingDefaults()


async def test_a_request_changes_only_what_it_says() -> None:
    engine: FakeEngine = speaking()
    own = SamplingDefaults(temperature=0.5, top_p=0.75, top_k=7, min_p=0.25, repetition_penalty=1.5)
    async with client(make_app(engine, sampling=own)) as http:
        await http.post("/v1/chat/completions", json=chat_body())
        await http.post("/v1/chat/completions", json=chat_body(temperature=0, top_k=-1, min_p=0, top_p=1))
        (model,) = (await http.get("/v1/models")).json()["data"]
    first, second = (submitted.sampling for submitted in engine.submitted)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.repetition_penalty) == (
        0.5, 0.75, 7, 0.25, 1.5,
    )  # fmt: skip
    assert (second.temperature, second.top_p, second.top_k, second.min_p) == (0, 1, 0, 0)
    assert second.repetition_penalty == 1.5
    assert model["default_sampling"] == {
        "temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5,
    }  # fmt: skip
    assert isinstance(model["default_sampling"]["top_k"], int)


async def test_what_is_off_is_told_as_null() -> None:
    engine: FakeEngine = speaking()
    async with client(make_app(engine, sampling=SamplingDefaults(temperature=0.2, top_p=0.9))) as http:
        model = (await http.get(f"/v1/models/{MODEL}")).json()
        told: dict[str, Any] = {
            "temperature": 0.2,
            "top_p": 0.9,
            "top_k": None,
            "min_p": None,
            "repetition_penalty": None,
        }
        assert model["default_sampling"] == told
        # Sent back as they are told, they change nothing.
        reply = await http.post("/v1/chat/completions", json=chat_body(**told))
        assert reply.status_code == 200, reply.text
    (submitted,) = engine.submitted
    assert (submitted.sampling.top_k, submitted.sampling.min_p, submitted.sampling.repetition_penalty) == (
        0,
        0,
        1,
    )
