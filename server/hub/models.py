"""Finds the files of the model that a user names: by a known name, a .gguf file, a folder, or a name of the hub."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from server.hub.catalogue import DEFAULT_MODEL, MODELS
from server.hub.download import fetch
from server.hub.repository import RepositoryName, parse_name
from server.hub.wheels import DownloadError, Report, silent

__all__ = ["DEFAULT_MODEL", "MODELS", "ModelError", "ModelFiles", "cache_folder", "model_file", "resolve"]


_OVERLAY = "indexer.safetensors"


class ModelError(Exception):
    """The model does not exist or is not valid; the message says what was found and what was expected."""


class ModelFiles(NamedTuple):
    """The paths of a model's files on this machine."""

    name: str  # what clients call it
    weights: Path  # a .gguf file, or a folder with config.json and *.safetensors
    overlay: Path | None  # a file with a lightning indexer for these weights
    license: str | None  # None if it is not known


def resolve(
    model: str = DEFAULT_MODEL,
    *,
    overlay: Path | None = None,
    report: Report = silent,
    rehash: bool = False,
    config_only: bool = False,
) -> ModelFiles:
    """Find a model's files. Those of a known model, or of a repository of the hub, are downloaded if they are missing.

    Args:
        model: a name in `MODELS`, the path of a .gguf file or of a folder, or `org/name` of the Hugging Face hub; what
            exists here wins.
        overlay: an indexer overlay to use instead of the one that belongs to the model.
        report: gets the progress of a download.
        rehash: hash a cached file again even if its stamp fits.
        config_only: the weights are not read, so a folder with config.json alone will do.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    if overlay is not None and not overlay.is_file():
        raise ModelError(f"the overlay {overlay} is not a file; expected a .safetensors file with an indexer")
    known = MODELS.get(model)
    if known is None:
        if not Path(model).expanduser().exists() and (name := parse_name(model)) is not None:
            return _remote(name, overlay, report, rehash=rehash, config_only=config_only)
        return _config_folder(model, overlay) if config_only else _local(model, overlay)
    if config_only:
        raise ModelError(f"{model} is a file without a config.json; name a folder that has one")
    target = model_file(model)
    try:
        fetch(known.source, target, report=report, rehash=rehash)
    except DownloadError as error:
        raise ModelError(str(error)) from error
    return ModelFiles(model, target, overlay or _packaged_overlay(model), known.license)


def model_file(model: str) -> Path:
    """Where the file of a known model is in the cache, or will be.

    Args:
        model: a name in `MODELS`
    """
    return cache_folder() / "models" / model / MODELS[model].source.name


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of downloaded models: $DSA_CACHE, else `dsa-serve` in the user's cache folder."""
    if chosen := environ.get("DSA_CACHE"):
        return Path(chosen).expanduser().absolute()
    if shared := environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "dsa-serve"
    return Path.home() / ".cache" / "dsa-serve"


def _packaged_overlay(model: str) -> Path | None:
    """The overlay that the engine's package has for this model; None if it has none."""
    resource = importlib.resources.files("engine").joinpath("overlays", f"{model}.safetensors")
    return Path(str(resource)) if resource.is_file() else None


def _remote(
    name: RepositoryName, overlay: Path | None, report: Report, *, rehash: bool, config_only: bool
) -> ModelFiles:
    from server.hub.remote import fetch_repository  # its library takes most of a second to import

    try:
        found = fetch_repository(name, report=report, rehash=rehash, config_only=config_only)
    except DownloadError as error:
        raise ModelError(str(error)) from error
    beside = found.folder / _OVERLAY
    overlay = overlay or (beside if beside.is_file() else None)
    return ModelFiles(name.served, found.weights, overlay, found.license)


def held_files(name: RepositoryName) -> Path | None:
    """The weights of a repository that are whole in the cache; None if they are not. Nobody is asked."""
    from server.hub.shared_cache import SharedCache

    try:
        held = SharedCache(name).held(config_only=False)
    except DownloadError:
        return None
    return None if held is None else held.weights


def _local(model: str, overlay: Path | None) -> ModelFiles:
    path = Path(model).expanduser().absolute()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a {path.suffix or 'nameless'} file; expected a .gguf file, or a folder"
            )
        return ModelFiles(path.stem, path, overlay, None)
    if path.is_dir():
        return _folder(path, overlay)
    raise ModelError(
        f"there is no model {model!r}: it is neither a file or folder nor one of the names {', '.join(MODELS)}, nor "
        "org/name of the Hugging Face hub"
    )


def _config_folder(model: str, overlay: Path | None) -> ModelFiles:
    path = Path(model).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json, which says what random weights to make; name a folder with one"
        )
    return ModelFiles(path.name, path, overlay, None)


def _folder(path: Path, overlay: Path | None) -> ModelFiles:
    expected = "expected exactly one .gguf file, or config.json with *.safetensors"
    beside = path / _OVERLAY
    overlay = overlay or (beside if beside.is_file() else None)
    names = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    tensors = [name for name in names if name.endswith(".safetensors") and name != beside.name]
    if "config.json" in names and tensors:
        return ModelFiles(path.name, path, overlay, None)
    if len(ggufs) == 1:
        return ModelFiles(path.name, path / ggufs[0], overlay, None)
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} .gguf files ({_some(ggufs)}); name the one to load")
    if tensors:
        raise ModelError(f"{path} holds {_some(tensors)} but no config.json; {expected}")
    raise ModelError(f"{path} holds {_some(names) if names else 'nothing'}; {expected}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
