"""Names of the hub, and which files of a repository are chosen."""

from __future__ import annotations

import re
from typing import Any

import pytest

from server.hub.repository import RemoteFile, RepositoryName, is_adapter, parse_name, text_files, weight_files
from server.hub.wheels import DownloadError

NAME = RepositoryName("org/name")


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 10) for path in paths]


def chosen(choice: str | None, *paths: str, index: dict[str, Any] | None = None) -> list[str]:
    return [file.path for file in weight_files(NAME._replace(choice=choice), files(*paths), index)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", NAME),
        ("hf.co/org/name", NAME),
        ("https://huggingface.co/org/name", NAME),
        ("Qwen/Qwen2.5-7B_x", RepositoryName("Qwen/Qwen2.5-7B_x")),
        ("org/name@refs/pr/1", RepositoryName("org/name", "refs/pr/1")),
        ("org/name:Q4_K_M", RepositoryName("org/name", choice="Q4_K_M")),
        ("org/name@v1:sub/a-Q4_K_M.gguf", RepositoryName("org/name", "v1", "sub/a-Q4_K_M.gguf")),
    ],
)
def test_names(text: str, expected: RepositoryName) -> None:
    assert parse_name(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "/org/name",
        "./org/name",
        "~/name",
        "a/b/c",
        "org/",
        "org/na me",
        "org/../name",
        "org/name@",
        "org/name:",
        "",
    ],
)
def test_what_is_no_name(text: str) -> None:
    assert parse_name(text) is None


def test_how_a_name_is_written() -> None:
    name = RepositoryName("org/name", "v1", "Q8_0")
    assert (str(name), name.served) == ("org/name@v1:Q8_0", "org/name:Q8_0")
    assert (str(NAME), NAME.served) == ("org/name", "org/name")


def test_the_config_comes_first_and_no_code_is_among_the_texts() -> None:
    paths = (
        "modeling_x.py", "tokenizer.json", "config.json", "README.md", "tokenizer_config.json", "vocab.json",
        "model.safetensors.index.json", "sub/config.json", "training_args.bin", "chat_template.jinja",
    )  # fmt: skip
    assert [file.path for file in text_files(files(*paths))] == [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors.index.json"
    ]  # fmt: skip


def test_safetensors() -> None:
    assert chosen(None, "config.json", "model.safetensors", "consolidated.safetensors", "a.gguf") == [
        "model.safetensors"
    ]
    assert chosen(None, "config.json", "weights.safetensors") == ["weights.safetensors"]
    index = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    paths = ("config.json", "m-1.safetensors", "m-2.safetensors", "other.safetensors", "indexer.safetensors")
    assert chosen(None, *paths, index=index) == ["m-1.safetensors", "m-2.safetensors", "indexer.safetensors"]


QUANTS = (
    "Model-7B-Q4_K_M.gguf",
    "Model-7B-Q4_K_S.gguf",
    "Model-7B-IQ4_XS.gguf",
    "f16/Model-7B-F16.gguf",
    "mmproj-f16.gguf",
)


def test_gguf() -> None:
    assert chosen(None, "a.gguf", "README.md", "mmproj-a.gguf") == ["a.gguf"]
    assert chosen("Q4_K_M", *QUANTS) == ["Model-7B-Q4_K_M.gguf"]
    assert chosen("q4_k_s", *QUANTS, "indexer.safetensors") == ["Model-7B-Q4_K_S.gguf", "indexer.safetensors"]
    assert chosen("f16/Model-7B-F16.gguf", *QUANTS) == ["f16/Model-7B-F16.gguf"]
    assert chosen("F16", *QUANTS) == ["f16/Model-7B-F16.gguf"]
    # The name of a file says more than safetensors beside it.
    assert chosen("Q4_K_M", *QUANTS, "config.json", "model.safetensors") == ["Model-7B-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("choice", "paths", "sentence"),
    [
        (None, QUANTS, "holds 4 GGUF files: name one of them, such as org/name:Q4_K_M. They are Q4_K_M, Q4_K_S, IQ4_XS, F16"),
        ("Q9", QUANTS, "org/name has no GGUF file Q9; it has Q4_K_M, Q4_K_S, IQ4_XS, F16"),
        ("Q8_0", ("a-Q8_0.gguf", "b-Q8_0.gguf"), "has 2 GGUF files that end in Q8_0; it has a-Q8_0.gguf, b-Q8_0.gguf"),
        ("Q8_0", ("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"), "split into parts, which are not read"),
        (None, ("m-00001-of-00001.gguf",), "split into parts"),
        ("Q8_0", ("config.json", "model.safetensors"), "org/name holds no GGUF files; name it without :Q8_0"),
        (None, ("config.json", "pytorch_model.bin"), "only as pytorch_model.bin and the like, which may be pickles"),
        (None, ("model.safetensors",), "holds no weights"),
        (None, ("config.json", "a.safetensors", "b.safetensors"), "holds no weights"),
        (None, ("README.md",), "holds no weights: expected model.safetensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(choice: str | None, paths: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(DownloadError, match=re.escape(sentence)):
        chosen(choice, *paths)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not among"),
        ({"weight_map": {"a": "config.json"}}, "names config.json, which is not among"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names ../x.safetensors, which is not among"),
    ],
)
def test_an_index_that_does_not_fit(index: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DownloadError, match=re.escape(sentence)):
        chosen(None, "config.json", "m-1.safetensors", index=index)


def test_an_adapter() -> None:
    assert is_adapter(files("adapter_config.json", "adapter_model.safetensors"))
    assert not is_adapter(files("adapter_config.json", "config.json", "model.safetensors"))
