"""Settings: precedence, names, and a sentence for every bad value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from server.config import ServerConfig
from server.hub.models import ModelFiles
from server.hub.sizes import SizeError, parse_size, size_text
from server.settings import FLAGS, Settings, SettingsError, default_ledger, load_settings

FILES = ModelFiles("tiny", Path("/models/tiny.gguf"), Path("/models/tiny.safetensors"), None)


def test_defaults_are_those_of_the_parts() -> None:
    settings = load_settings({}, {})
    assert settings == Settings()
    assert settings.server("tiny") == ServerConfig(model_name="tiny", ledger=default_ledger())
    expected = EngineConfig(weights="/models/tiny.gguf", overlay="/models/tiny.safetensors")
    assert settings.engine(FILES) == expected


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "dsa.toml"
    file.write_text('port = 1\nmax-queue = 11\nmax_running = 21\nkv_cache_memory = "2GiB"\n')
    settings = load_settings(
        {"port": 3, "max_queue": None}, {"DSA_PORT": "2", "DSA_MAX_QUEUE": "12", "DSA_HOST": ""}, file
    )
    assert (settings.port, settings.max_queue, settings.max_running) == (3, 12, 21)
    assert settings.host == "127.0.0.1"
    assert settings.engine(FILES).kv_cache_bytes == 2 << 30


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "dsa.toml"
    file.write_text("max_body = 1048576")
    assert load_settings({}, {"DSA_CONFIG": str(file)}).server("x").max_body_bytes == 1 << 20


@pytest.mark.parametrize("text", ["128", "dense"])
def test_sparsity_is_a_number_or_dense(text: str) -> None:
    top_k = load_settings({"top_k": text}, {}).server("x").default_top_k
    assert top_k == (int(text) if text.isdigit() else text)


def test_booleans_in_the_environment() -> None:
    assert load_settings({}, {"DSA_PREFIX_CACHING": "false"}).engine(FILES).prefix_caching is False


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1GiB", 1 << 30), ("1.5 MiB", 3 << 19), ("2kb", 2000), ("3G", 3 * 10**9), ("4mi", 4 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["1", "1000", "3KiB", "64MiB", "1GiB", "1536MiB"])
def test_sizes_are_written_as_they_are_read(text: str) -> None:
    assert size_text(parse_size(text, "x")) == text


@pytest.mark.parametrize("text", ["", "GiB", "1XB", "-1", "0", "1e3", "1 GiB more"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SizeError, match="such as 512MiB"):
        parse_size(text, "x")


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        ({"port": 70000}, {}, r"^--port is 70000; expected int <= 65535"),
        ({}, {"DSA_PORT": "tcp://10.0.0.1:80"}, r"^DSA_PORT is 'tcp://10.0.0.1:80'; expected int"),
        ({"max_queue": 0}, {}, r"^--max-queue is 0; expected int >= 1"),
        ({"dtype": "fp4"}, {}, r"^--dtype is 'fp4'; expected one of auto, float32, bfloat16"),
        ({"top_k": "all"}, {}, r"^--top-k is 'all'; expected a number of tokens, or dense"),
        ({"top_k": "0"}, {}, r"^--top-k is '0'; expected"),
        ({"drain_seconds": -1}, {}, r"^--drain-seconds is -1; expected float >= 0"),
        (
            {"served_model_name": "a,,b"},
            {},
            r"^served_model_name is 'a,,b'; expected a name, or names with commas",
        ),
        ({"kv_cache_memory": "lots"}, {}, r"^kv_cache_memory is 'lots'; expected a size"),
        (
            {"token_budget": 8, "max_running": 64},
            {},
            r"token_budget \(8\) must be at least max_running \(64\)",
        ),
    ],
)
def test_a_bad_value_is_a_sentence(flags: dict[str, Any], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load_settings(flags, environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 1", "'colour', which is no setting"),
        ("port = ", "cannot be read"),
        ("port = 'x'", "port in .* is 'x'; expected int"),
        ("max_tokens = true", "max_tokens in .* is True; expected int"),
    ],
)
def test_a_bad_file_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "dsa.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=sentence):
        load_settings({}, {}, file)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings({}, {}, tmp_path / "none.toml")


def test_every_field_of_a_part_has_a_setting() -> None:
    """An engine setting is one field of EngineConfig and one of Settings: none is forgotten."""
    given = {flag.bytes_of or name for name, flag in FLAGS.items()}
    assert set(EngineConfig.__struct_fields__) - given == {"weights"}
    renamed = {"model_name", "model_aliases", "default_max_tokens", "default_top_k", "sampling"}
    assert set(ServerConfig.__struct_fields__) - given == renamed


def test_the_first_served_name_is_the_one_in_answers() -> None:
    assert load_settings({}, {}).server("file").model_names == ("file",)
    named = load_settings({"served_model_name": "a/b, gpt-4o,a/b"}, {}).server("file")
    assert (named.model_name, named.model_aliases) == ("a/b", ("gpt-4o",))


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        ServerConfig(model_name="x").port = 1  # type: ignore[misc]


def test_drafts_need_a_drafter() -> None:
    with pytest.raises(
        SettingsError, match="speculative_tokens is 3, but drafter is off; set drafter to ngram"
    ):
        load_settings({"speculative_tokens": 3}, {})
    assert load_settings({}, {}).engine(FILES).draft_tokens == 0
    assert load_settings({"drafter": "ngram"}, {}).engine(FILES).draft_tokens == 4
    assert load_settings({"drafter": "ngram", "speculative_tokens": 7}, {}).engine(FILES).draft_tokens == 7
    with pytest.raises(SettingsError, match="one of off, ngram, mtp"):
        load_settings({"drafter": "eagle"}, {})


@pytest.mark.parametrize(
    ("kind", "asked", "limit"),
    [
        ("llama", None, 1024),
        ("deepseek_v32", None, 8192),
        ("deepseek_v3", None, 8192),
        ("deepseek_v32", 7, 7),
    ],
)
def test_the_token_limit_of_requests_that_name_none(kind: str, asked: int | None, limit: int) -> None:
    assert load_settings({"max_tokens": asked}, {}).server("m", kind).default_max_tokens == limit


def test_servers_that_tests_start_write_into_no_ledger_of_the_user() -> None:
    assert load_settings({}, os.environ).server("any").ledger is None
