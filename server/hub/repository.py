"""Repositories of the Hugging Face hub: how a user names one, and which of its files a model needs.

Only files that the server or the engine reads are fetched. Code and pickles, which could run code, are never among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from server.hub.wheels import DownloadError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OVERLAY = "indexer.safetensors"
_TEXTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
)
"""What is read besides weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_NAME = re.compile(
    r"(?:(?:https://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w.][\w./-]*))?(?::(?P<choice>[\w./-]+))?"
)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


class RepositoryName(NamedTuple):
    """`org/name[@revision][:file]` as it was read."""

    repository: str  # org/name
    revision: str = "main"  # a branch, a tag or a commit
    choice: str | None = None  # of several GGUF files: a path, or what stands before .gguf, such as Q4_K_M

    @property
    def served(self) -> str:
        """What clients call the model."""
        return self.repository if self.choice is None else f"{self.repository}:{self.choice}"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repository}{revision}" + ("" if self.choice is None else f":{self.choice}")


class RemoteFile(NamedTuple):
    """A file of a repository, and the hash that the hub says it has."""

    path: str
    size: int
    sha256: str | None = None  # of files in large storage
    git_sha1: str | None = None  # of other files: git's hash, of "blob SIZE\0" and the content

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.path).name


def parse_name(text: str) -> RepositoryName | None:
    """Read `org/name`, `org/name@revision`, `org/name:Q4_K_M` or `org/name@revision:file.gguf`; None for other texts.

    `hf.co/` or `https://huggingface.co/` may stand before it.
    """
    match = _NAME.fullmatch(text)
    if match is None or ".." in text:
        return None
    return RepositoryName(match["repository"], match["revision"] or "main", match["choice"])


def text_files(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The config, the tokenizer, the chat template and the index of the weights, the config first."""
    at = {file.path: file for file in files}
    return [at[path] for path in _TEXTS if path in at]


def weight_files(
    name: RepositoryName, files: Sequence[RemoteFile], index: Mapping[str, Any] | None
) -> list[RemoteFile]:
    """Choose the files with the weights: one GGUF file, or safetensors; an indexer's file comes last.

    Args:
        name: says which GGUF file; without a choice, safetensors come before GGUF.
        files: the repository's.
        index: the object of `INDEX`; None if there is none.

    Raises:
        DownloadError: there are no weights that can be read, or it is not clear which; the message says what to do.
    """
    overlay = [file for file in files if file.path == _OVERLAY]
    ggufs = [file for file in files if _is_gguf(file)]
    if name.choice is not None:
        return [_chosen(name, name.choice, ggufs), *overlay]
    if tensors := _safetensors(name, files, index):
        return [*tensors, *overlay]
    if len(ggufs) == 1:
        return [_whole(name, ggufs[0]), *overlay]
    if ggufs:
        raise DownloadError(
            f"{name} holds {len(ggufs)} GGUF files: name one of them, such as {name}:{_label(ggufs, ggufs[0])}. They are "
            + ", ".join(_label(ggufs, file) for file in ggufs[:30])
        )
    if pickles := [file.path for file in files if file.name.endswith(_PICKLES)]:
        raise DownloadError(
            f"{name} holds its weights only as {pickles[0]} and the like, which may be pickles, and loading a pickle can run "
            "any code: use a repository with safetensors or a GGUF file"
        )
    raise DownloadError(
        f"{name} holds no weights: expected {_SINGLE}, {INDEX} with its files, or a GGUF file; name another repository"
    )


def is_adapter(files: Sequence[RemoteFile]) -> bool:
    """Whether a repository holds only what is laid over another model (LoRA)."""
    paths = {file.path for file in files}
    return "adapter_config.json" in paths and CONFIG not in paths


def _safetensors(
    name: RepositoryName, files: Sequence[RemoteFile], index: Mapping[str, Any] | None
) -> list[RemoteFile]:
    """The files of one checkpoint; other files beside them hold the same weights once more, or something else."""
    at = {file.path: file for file in files}
    if CONFIG not in at:
        return []
    if index is not None:
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise DownloadError(
                f"{INDEX} of {name} has no weight_map that says which file holds which tensor"
            )
        shards = sorted({str(shard) for shard in listed.values()})
        if missing := [shard for shard in shards if shard not in at or not shard.endswith(".safetensors")]:
            raise DownloadError(
                f"{INDEX} of {name} names {missing[0]}, which is not among its safetensors files; the repository is "
                "not whole"
            )
        return [at[shard] for shard in shards]
    if _SINGLE in at:
        return [at[_SINGLE]]
    found = [path for path in at if path.endswith(".safetensors") and "/" not in path and path != _OVERLAY]
    return [at[found[0]]] if len(found) == 1 else []


def _is_gguf(file: RemoteFile) -> bool:
    """Whether a file may be a language model; `mmproj` files are the eyes of one."""
    return file.name.lower().endswith(".gguf") and not file.name.lower().startswith("mmproj")


def _chosen(name: RepositoryName, choice: str, ggufs: Sequence[RemoteFile]) -> RemoteFile:
    if not ggufs:
        raise DownloadError(f"{name.repository} holds no GGUF files; name it without :{choice}")
    wanted = choice.lower().removesuffix(".gguf")
    found = [file for file in ggufs if wanted in (_stem(file.path), _stem(file.name))]
    found = found or [
        file for file in ggufs if re.search(rf"(?:^|[._-]){re.escape(wanted)}$", _stem(file.name))
    ]
    if len(found) == 1:
        return _whole(name, found[0])
    labels = ", ".join(_label(ggufs, file) for file in (found or ggufs)[:30])
    if any(_PART.search(file.path) and wanted in file.path.lower() for file in ggufs) and not found:
        raise _in_parts(name)
    what = f"{len(found)} GGUF files that end in" if found else "no GGUF file"
    raise DownloadError(f"{name.repository} has {what} {choice}; it has {labels}")


def _whole(name: RepositoryName, file: RemoteFile) -> RemoteFile:
    if _PART.search(file.path):
        raise _in_parts(name)
    return file


def _in_parts(name: RepositoryName) -> DownloadError:
    return DownloadError(
        f"{name} is a GGUF file split into parts, which are not read: join them with `llama-gguf-split --merge` and give the "
        "file's path, or name a smaller file of the repository"
    )


def _stem(path: str) -> str:
    return path.lower().removesuffix(".gguf")


def _label(ggufs: Sequence[RemoteFile], file: RemoteFile) -> str:
    """The shortest end of a file's name that no other file has, cut where people cut it: Q4_K_M."""
    stem = PurePosixPath(file.path).name[: -len(".gguf")]
    others = [_stem(other.name) for other in ggufs if other is not file]
    for match in sorted(re.finditer(r"[.-]", stem), key=lambda one: -one.start()):
        end = stem[match.end() :]
        if not any(re.search(rf"(?:^|[._-]){re.escape(end.lower())}$", other) for other in others):
            return end
    return file.path
