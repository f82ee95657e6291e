"""Finding a model's files, and what is said when they are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.hub.models import DEFAULT_MODEL, MODELS, ModelError, ModelFiles, cache_folder, resolve
from server.hub.parts import SplitFile


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).touch()
    return tmp_path


def test_a_file(tmp_path: Path) -> None:
    file = folder(tmp_path, "tiny.gguf", "o.safetensors") / "tiny.gguf"
    assert resolve(str(file)) == ModelFiles("tiny", file, None, None)
    overlay = tmp_path / "o.safetensors"
    assert resolve(str(file), overlay=overlay).overlay == overlay


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    path = folder(tmp_path, "tiny.gguf", "indexer.safetensors", "README.md")
    expected = ModelFiles(tmp_path.name, tmp_path / "tiny.gguf", tmp_path / "indexer.safetensors", None)
    assert resolve(str(path)) == expected


def test_a_folder_with_safetensors(tmp_path: Path) -> None:
    path = folder(
        tmp_path, "config.json", "model-1.safetensors", "model-2.safetensors", "indexer.safetensors"
    )
    assert resolve(str(path)) == ModelFiles(tmp_path.name, tmp_path, tmp_path / "indexer.safetensors", None)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ((), r"holds nothing; expected exactly one \.gguf"),
        (("a.txt", "b.txt"), r"holds a\.txt, b\.txt; expected"),
        (("a.gguf", "b.gguf"), r"holds 2 \.gguf files \(a\.gguf, b\.gguf\); name the one"),
        (("m.safetensors",), r"holds m\.safetensors but no config\.json"),
        (("config.json", "indexer.safetensors"), r"expected exactly one"),
        (tuple(f"{n}.txt" for n in range(9)), r"and 4 more"),
    ],
)
def test_other_folders(tmp_path: Path, names: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        resolve(str(folder(tmp_path, *names)))


def test_a_config_alone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json, which says what random weights to make"):
        resolve(str(tmp_path), config_only=True)
    with pytest.raises(ModelError, match=f"{DEFAULT_MODEL} is a file without a config.json"):
        resolve(DEFAULT_MODEL, config_only=True)
    path = folder(tmp_path, "config.json", "indexer.safetensors")
    assert resolve(str(path), config_only=True) == ModelFiles(tmp_path.name, tmp_path, None, None)


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"neither a file or folder nor one of the names {DEFAULT_MODEL}, "):
        resolve("gpt-17")
    with pytest.raises(ModelError, match=r"is a \.txt file; expected a \.gguf"):
        resolve(str(folder(tmp_path, "a.txt") / "a.txt"))
    with pytest.raises(ModelError, match="overlay .* is not a file"):
        resolve(str(folder(tmp_path, "a.gguf") / "a.gguf"), overlay=tmp_path / "none")


def test_the_default_model(default_model: Path) -> None:
    files = resolve()
    assert files.name == DEFAULT_MODEL
    assert files.weights == default_model
    assert files.license == "Apache-2.0"
    assert default_model.stat().st_size == MODELS[DEFAULT_MODEL].source.size


def test_the_coder_comes_in_parts() -> None:
    known = MODELS["qwen2.5-coder-1.5b-instruct"]
    assert isinstance(known.source, SplitFile)
    assert known.source.size == 1_117_320_768
    assert len({part.wheel_sha256 for part in known.source.parts}) == 22
    assert {part.size for part in known.source.parts[:-1]} == {50 << 20}
    assert known.license == "Apache-2.0"


def test_where_models_are_kept() -> None:
    assert cache_folder({"DSA_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/dsa-serve")
    assert cache_folder({}) == Path.home() / ".cache" / "dsa-serve"
