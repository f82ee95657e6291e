"""The cache that clients of the Hugging Face hub share, in the layout that `huggingface_hub` documents.

Of a repository it has `blobs/` (each file once), `snapshots/COMMIT/` (links to them under the files' names) and
`refs/REVISION` (which commit a branch was). Here a ref is only written when all of a model's files are there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from server.hub.repository import CONFIG, INDEX, RemoteFile, RepositoryName, weight_files
from server.hub.wheels import DownloadError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".gguf", ".safetensors")
_BLOCK = 1 << 20


class Fetched(NamedTuple):
    """A model's files in the cache."""

    folder: Path  # of one commit: the config, the tokenizer, safetensors
    weights: Path  # the folder, or its .gguf file
    license: str | None  # as the repository's card names it


class SharedCache:
    """The place of one repository in the cache."""

    def __init__(self, name: RepositoryName) -> None:
        self._name = name
        self.storage = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
            repo_id=name.repository, repo_type="model"
        )
        self.blobs = self.storage / "blobs"

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit."""
        return self.storage / "snapshots" / commit

    def pointer(self, commit: str, path: str) -> Path:
        """A file of a commit, which is a link to a blob."""
        return self.snapshot(commit) / path

    def unfinished(self, file: RemoteFile) -> Path:
        """Where a file grows until it is whole."""
        known = file.sha256 or file.git_sha1 or hashlib.sha256(file.path.encode()).hexdigest()
        return self.blobs / f"{known}.unfinished"

    def grown(self, file: RemoteFile) -> int:
        """Bytes of a file that an earlier try has left."""
        path = self.unfinished(file)
        return path.stat().st_size if path.is_file() else 0

    def refer(self, commit: str) -> None:
        """Remember that the revision is this commit, all of whose files are there."""
        if self._name.revision != commit:
            path = self.storage / "refs" / self._name.revision
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.new")
            new.write_text(commit, "utf-8")
            new.replace(path)

    def commit(self) -> str | None:
        """The commit that the revision was when it was last fetched; None if it never was."""
        if _COMMIT.fullmatch(self._name.revision):
            return self._name.revision
        path = self.storage / "refs" / self._name.revision
        return path.read_text("utf-8").strip() if path.is_file() else None

    def has_weights(self, commit: str) -> bool:
        """Whether a commit has a file with weights, so that its fetching was begun."""
        return any(path.suffix in _WEIGHTS for path in self.snapshot(commit).rglob("*"))

    def held(self, *, config_only: bool) -> Fetched | None:
        """What the cache has of the revision; None if it is not whole.

        Raises:
            DownloadError: it is not clear which of its files are meant.
        """
        commit = self.commit()
        if commit is None or not (folder := self.snapshot(commit)).is_dir():
            return None
        if config_only:
            return Fetched(folder, folder, None) if (folder / CONFIG).is_file() else None
        files = [
            RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        if not self.has_weights(commit):
            return None
        index = read_object(folder / INDEX, self._name) if (folder / INDEX).is_file() else None
        first = weight_files(self._name, files, index)[0]
        return Fetched(folder, folder / first.path if first.path.endswith(".gguf") else folder, None)

    def check(self, folder: Path) -> None:
        """Hash the files of a commit: a blob has its hash as its name.

        Raises:
            DownloadError: a hash differs.
        """
        for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
            blob = path.resolve()
            if blob.parent == self.blobs.resolve():
                sha256 = blob.name if len(blob.name) == 64 else None
                git_sha1 = blob.name if len(blob.name) == 40 else None
                file = RemoteFile(path.relative_to(folder).as_posix(), blob.stat().st_size, sha256, git_sha1)
                verify(file, path, self._name)


def verify(file: RemoteFile, path: Path, name: RepositoryName) -> None:
    """Hash a file; delete it and raise DownloadError if the hash is not the hub's."""
    wanted = file.sha256 or file.git_sha1
    if wanted is None:
        return
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.sha256:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != wanted:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.path} of {name} has the hash {digest.hexdigest()}, and the hub says {wanted}; it was deleted: run the "
            "command again, and if it happens again check what stands between this machine and the hub"
        )


def read_object(path: Path, name: RepositoryName) -> Mapping[str, Any]:
    """Read the object in a JSON file of a repository; raises DownloadError if it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DownloadError(f"{path.name} of {name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DownloadError(f"{path.name} of {name} is not a JSON object")
    return value
