"""Fetches a model's files from the Hugging Face hub, or from a mirror of it, into the cache that its other clients share.

`huggingface_hub` makes the requests and lays out the cache, so its variables count: HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE and the others. Two things are done here, because it does not do them. A file that was stopped in the
middle goes on where it stopped, in another process too. And each file is held against the hub's hash before it is in
the cache.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from server.hub.download import locked, need_space
from server.hub.refusals import may_be_back_later, refusal, unreachable
from server.hub.repository import (
    CONFIG,
    INDEX,
    RemoteFile,
    RepositoryName,
    is_adapter,
    text_files,
    weight_files,
)
from server.hub.shared_cache import Fetched, SharedCache, read_object, verify
from server.hub.wheels import DownloadError, Report, silent

AT_ONCE = 4
"""How many files are downloaded at once."""

_SECONDS = 15.0  # for the answer about a repository
_STOP_SECONDS = 1.0  # for a thread to end at its next bytes

logging.getLogger("huggingface_hub").handlers.clear()  # its records go where all others go


class _Listing(NamedTuple):
    """What a repository holds at one commit."""

    commit: str
    files: Sequence[RemoteFile]
    license: str | None
    architecture: str | None  # of its GGUF files


def fetch_repository(
    name: RepositoryName,
    *,
    report: Report = silent,
    rehash: bool = False,
    config_only: bool = False,
) -> Fetched:
    """Make sure that a model of the hub is in the cache. Without a network, what is there already is used.

    Args:
        name: which repository, revision and file.
        report: gets the progress.
        rehash: hash files again that are in the cache.
        config_only: leave out the weights.

    Raises:
        DownloadError: there is no such model, or it is not for this client, or the engine does not serve it, or the
            transfer failed, or a hash is not the hub's; the message says what to do.
    """
    report("asking the hub", 0, 0)
    try:
        cache = SharedCache(name)
        listing = _ask(name)
    except HFValidationError as error:
        raise DownloadError(
            f"{name.repository} is no file or folder here, and no name of the hub: {error}"
        ) from error
    except (httpx2.HTTPError, OSError) as error:
        if not may_be_back_later(error):
            raise refusal(name, error) from error
        held = cache.held(config_only=config_only)
        if held is None:
            raise unreachable(name, error) from error
        report("the hub cannot be reached: the files of the cache are used", 0, 0)
        if rehash:
            report("checking", 0, 0)
            cache.check(held.folder)
        return held
    try:
        fetch = _Fetch(name, listing, cache, report, rehash=rehash, config_only=config_only)
        if not rehash and (whole := fetch.whole()) is not None:
            return whole
        cache.storage.mkdir(parents=True, exist_ok=True)
        with locked(cache.storage / ".dsa.lock", report):
            return fetch.run()
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        raise refusal(name, error) from error
    except OSError as error:
        if error.errno is None:  # the library's own: sizes that do not fit, an answer that is not a hub's
            raise refusal(name, error) from error
        raise DownloadError(
            f"cannot write {name} into {cache.storage}: {error.strerror or error}; set HF_HOME to a folder with room that "
            "you can write to"
        ) from error


class _Fetch:
    """Brings one commit of a repository into the cache.

    Raises:
        DownloadError: the repository holds no model that can be fetched.
    """

    def __init__(
        self, name: RepositoryName, listing: _Listing, cache: SharedCache, report: Report, *,
        rehash: bool, config_only: bool,
    ) -> None:  # fmt: skip
        self._name, self._listing, self._cache = name, listing, cache
        self._report, self._rehash, self._config_only = report, rehash, config_only
        if is_adapter(listing.files):
            raise DownloadError(
                f"{name} is an adapter (LoRA), not a model; name a model with its own weights"
            )
        if config_only and not any(file.path == CONFIG for file in listing.files):
            raise DownloadError(f"{name} has no {CONFIG}; name a repository that has one")
        self._texts = text_files(listing.files) if config_only or not self._means_gguf() else []

    def whole(self) -> Fetched | None:
        """The model, if all of it is in the cache already, which may be read-only; else None."""
        if not all(map(self._is_there, self._texts)):
            return None
        weights = [] if self._config_only else self._weights()
        return self._found(weights) if all(map(self._is_there, weights)) else None

    def run(self) -> Fetched:
        """Fetch what is missing.

        Raises:
            DownloadError: the engine does not serve the model, or its weights cannot be read, or a hash is wrong.
        """
        commit, architecture = self._listing.commit, self._listing.architecture
        asks = not self._config_only and not self._cache.has_weights(commit)
        # The config is the first: what is not served is told before anything else is fetched.
        for file in self._texts:
            self._get(file, TransferProgress(self._report, 0))
            if file.path == CONFIG and asks:
                self._check_served("--config", str(self._cache.pointer(commit, CONFIG)))
        weights = [] if self._config_only else self._weights()
        if _is_gguf(weights) and architecture is not None and asks:
            self._check_served("--gguf", architecture)
        if weights:
            self._get_all(weights)
        self._cache.refer(commit)
        return self._found(weights)

    def _weights(self) -> list[RemoteFile]:
        """Choose the files with the weights; the index of shards must be there."""
        path = self._cache.pointer(self._listing.commit, INDEX)
        index = read_object(path, self._name) if any(file.path == INDEX for file in self._texts) else None
        return weight_files(self._name, self._listing.files, index)

    def _found(self, weights: Sequence[RemoteFile]) -> Fetched:
        folder = self._cache.snapshot(self._listing.commit)
        return Fetched(
            folder, folder / weights[0].path if _is_gguf(weights) else folder, self._listing.license
        )

    def _means_gguf(self) -> bool:
        """Whether the weights will be a GGUF file, which has config, tokenizer and template in it."""
        return self._name.choice is not None or not any(
            file.name.endswith(".safetensors") for file in self._listing.files
        )

    def _check_served(self, flag: str, value: str) -> None:
        """Ask the engine, in a process of its own because it imports torch.

        Raises:
            DownloadError: the engine does not serve the model.
        """
        self._report("asking the engine whether it serves the model", 0, 0)
        what = f"{self._name}" if flag == "--gguf" else f"{CONFIG} of {self._name}"
        command = [sys.executable, "-P", "-m", "engine.models", flag, value, "--name", what]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode != 0:
            said = (asked.stdout + asked.stderr).strip().splitlines()
            raise DownloadError(said[-1] if said else f"the engine could not read {what}")

    def _get_all(self, files: Sequence[RemoteFile]) -> None:
        missing = [file for file in files if not self._is_there(file)]
        needed = sum(file.size - self._cache.grown(file) for file in missing)
        need_space(self._cache.storage, needed, "HF_HOME")
        stage = "checking" if self._rehash and not missing else "downloading"
        progress = TransferProgress(self._report, sum(file.size for file in files), stage)
        waiting = queue.SimpleQueue[RemoteFile | None]()
        ended = queue.SimpleQueue[BaseException | None]()
        for file in (*files, *([None] * AT_ONCE)):
            waiting.put(file)

        def work() -> None:
            try:
                while (file := waiting.get()) is not None:
                    self._get(file, progress)
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

        # Daemons, because a thread that waits for a silent hub does not end at Ctrl-C.
        threads = [threading.Thread(target=work, name="download", daemon=True) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                if (error := ended.get()) is not None:
                    raise error
        except Exception:
            progress.stop()
            for thread in threads:
                thread.join(_STOP_SECONDS)
            raise

    def _is_there(self, file: RemoteFile) -> bool:
        pointer = self._cache.pointer(self._listing.commit, file.path)
        return pointer.is_file() and pointer.stat().st_size == file.size

    def _get(self, file: RemoteFile, progress: TransferProgress) -> None:
        """Fetch a file, if it is not there.

        Raises:
            DownloadError: its hash is not the hub's.
        """
        pointer = self._cache.pointer(self._listing.commit, file.path)
        if self._is_there(file):
            if self._rehash:
                verify(file, pointer, self._name)
            progress.add(file.size)
            return
        pointer.unlink(missing_ok=True)  # of another size: damaged
        repository, commit = self._name.repository, self._listing.commit
        url = hf_hub_url(repository, file.path, revision=commit)
        etag = get_hf_file_metadata(url).etag
        if etag is None or not re.fullmatch(r"[\w.+-]+", etag):
            raise DownloadError(
                f"{constants.ENDPOINT} answers for {file.path} of {self._name} without an ETag; it is no hub: check HF_ENDPOINT"
            )
        blob = self._cache.blobs / etag
        if blob.is_file() and blob.stat().st_size != file.size:
            blob.unlink()
        if not blob.is_file():
            self._transfer(url, file, blob, progress)
        hf_hub_download(
            repository, file.path, revision=commit
        )  # the blob is there: this only makes the link to it

    def _transfer(self, url: str, file: RemoteFile, blob: Path, progress: TransferProgress) -> None:
        blob.parent.mkdir(parents=True, exist_ok=True)
        grown = self._cache.unfinished(file)
        bar = bar_of(progress)
        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            # Plain HTTP has no files of this size: Xet, the hub's own protocol, fetches them.
            try:
                whole = hf_hub_download(
                    self._name.repository, file.path, revision=self._listing.commit, tqdm_class=bar
                )
            except ValueError as error:
                raise DownloadError(
                    f"{file.path} of {self._name} has {file.size >> 30} GiB, which this hub does not send without Xet: install "
                    "hf_xet and unset HF_HUB_DISABLE_XET, or use a repository whose weights are in smaller files"
                ) from error
            verify(file, Path(whole), self._name)
            return
        if self._cache.grown(file) > file.size:
            grown.unlink()
        with grown.open("ab") as out:
            done = out.tell()
            progress.add(done)
            http_get(
                url,
                out,
                resume_size=done,
                headers=build_hf_headers(library_name="dsa-serve"),
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=bar,
            )
        verify(file, grown, self._name)
        grown.replace(blob)


class TransferProgress:
    """Adds up what the threads have fetched, and stops them."""

    def __init__(self, report: Report, total: int, stage: str = "downloading") -> None:
        self._report, self._total, self._stage = report, total, stage
        self._done = 0
        self._stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes; raises DownloadError once the download was stopped."""
        if self._stopped:
            raise DownloadError("the download was stopped")
        with self._lock:
            self._done += count
            if self._total:
                self._report(self._stage, min(self._done, self._total), self._total)

    def stop(self) -> None:
        """Let every thread end at its next bytes."""
        self._stopped = True


def bar_of(progress: TransferProgress) -> type[Any]:
    """Make the class that `huggingface_hub` takes for one of tqdm: its bars count into `progress`."""

    class Bar:
        def __init__(self, **unused: Any) -> None:
            self.total: int | None = None

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *unused: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            progress.add(count)

        def update_transfer(self, count: int) -> None:
            """Xet's bytes on the wire, which are fewer; a class that has this method is one bar for both."""

        def set_postfix_str(self, *unused: object, **also: object) -> None:
            pass

        set_transfer_postfix_str = refresh = close = set_postfix_str

    return Bar


def _is_gguf(weights: Sequence[RemoteFile]) -> bool:
    return bool(weights) and weights[0].path.endswith(".gguf")


def _ask(name: RepositoryName) -> _Listing:
    """Ask the hub what a repository holds.

    Raises:
        DownloadError: what answers is no hub.
        HfHubHTTPError, httpx2.HTTPError, OSError: there is no such repository, or no answer.
    """
    try:
        info = HfApi(library_name="dsa-serve").model_info(
            name.repository, revision=name.revision, files_metadata=True, timeout=_SECONDS
        )
    except json.JSONDecodeError as error:
        raise DownloadError(f"{constants.ENDPOINT} does not answer as a hub: check HF_ENDPOINT") from error
    files = [
        RemoteFile(
            one.rfilename,
            one.size or 0,
            one.lfs.sha256 if one.lfs else None,
            None if one.lfs else one.blob_id,
        )
        for one in info.siblings or ()
    ]
    card, gguf = info.card_data, info.gguf or {}
    license_ = card.get("license") if card is not None else None
    return _Listing(info.sha or name.revision, files, license_, gguf.get("architecture"))
