"""Models of the hub, from a stand-in of it: what is fetched, checked, resumed, refused, and found again offline."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from server.hub.models import ModelError, ModelFiles, resolve
from server.hub.remote import TransferProgress, _Fetch, bar_of
from tests.server.hub.stand_in import StandIn

CONFIG = json.dumps({"model_type": "llama"}).encode()
FILES = {
    "README.md": b"words",
    "config.json": CONFIG,
    "tokenizer.json": b"{}" * 700,  # large enough for the other storage
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle" * 1000,
    "model.safetensors": bytes(range(256)) * 40,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # what a break loses at most
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def any_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, which a process asks, is not asked."""
    monkeypatch.setattr(_Fetch, "_check_served", lambda self, flag, value: None)


def contents(files: ModelFiles) -> dict[str, bytes]:
    folder = files.weights if files.weights.is_dir() else files.weights.parent
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fails(model: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(model, **options)
    return str(caught.value)


@pytest.mark.usefixtures("any_family")
class TestFetching:
    def test_only_what_is_read_is_fetched(self, hub: StandIn) -> None:
        hub.put("org/name", FILES, cardData={"license": "mit"})
        files = resolve("org/name")
        assert (files.name, files.overlay, files.license) == ("org/name", None, "mit")
        assert contents(files) == {
            name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json")
        }
        assert sorted(hub.sent) == ["config.json", "model.safetensors", "tokenizer.json"]

    def test_the_second_time_nothing_is_sent(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        first = resolve("org/name")
        hub.asked.clear()
        assert resolve("org/name") == first
        assert [one.path for one in hub.asked if "harness" not in one.path] == [
            "/api/models/org/name/revision/main"
        ]

    def test_a_whole_cache_may_be_read_only(self, hub: StandIn, tmp_path: Path) -> None:
        hub.put("org/name", FILES)
        first = resolve("org/name")
        locks = list((tmp_path / "cache").rglob("*.lock"))
        assert locks
        for file in locks:
            file.unlink()
        assert resolve("org/name") == first
        assert not list((tmp_path / "cache").rglob("*.lock"))

    def test_progress_reaches_the_end(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        said: list[tuple[str, int, int]] = []
        resolve("org/name", report=lambda *one: said.append(one))
        assert said[0] == ("asking the hub", 0, 0)
        size = len(FILES["model.safetensors"])
        assert said[-1] == ("downloading", size, size)
        done = [done for stage, done, _ in said if stage == "downloading"]
        assert done == sorted(done)
        assert len(done) > 3

    def test_shards_and_an_indexer_beside_them(self, hub: StandIn) -> None:
        index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
        shards = {f"m-{i}.safetensors": bytes([i]) * 5000 for i in range(1, 4)}
        hub.put(
            "org/name",
            {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode(), **shards,
             "indexer.safetensors": b"overlay"},
        )  # fmt: skip
        files = resolve("org/name")
        assert files.overlay == files.weights / "indexer.safetensors"
        assert "m-2.safetensors" in contents(files)
        assert "m-3.safetensors" not in contents(files)

    def test_one_gguf_of_several(self, hub: StandIn) -> None:
        hub.put("org/name", {f"x-{kind}.gguf": kind.encode() * 1000 for kind in ("Q8_0", "Q4_K_M")})
        files = resolve("org/name:q8_0")
        assert files.name == "org/name:q8_0"
        assert files.weights.name == "x-Q8_0.gguf"
        assert contents(files) == {"x-Q8_0.gguf": b"Q8_0" * 1000}

    def test_a_revision(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        other = FILES | {"model.safetensors": b"other" * 999}
        commit = hub.put("org/name", other, revision="refs/pr/1")
        for name in ("org/name@refs/pr/1", f"org/name@{commit}"):
            files = resolve(name)
            assert (files.name, files.weights.name) == ("org/name", commit)
            assert contents(files)["model.safetensors"] == b"other" * 999

    def test_a_new_commit_fetches_what_has_changed(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        resolve("org/name")
        hub.sent.clear()
        hub.put("org/name", FILES | {"tokenizer.json": b"[]" * 700})
        assert contents(resolve("org/name"))["tokenizer.json"] == b"[]" * 700
        assert hub.sent == ["tokenizer.json"]

    def test_random_weights_need_no_weights(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        files = resolve("org/name", config_only=True)
        assert sorted(contents(files)) == ["config.json", "tokenizer.json"]

    def test_what_is_here_wins(self, hub: StandIn, tmp_path: Path) -> None:
        hub.put("org/name", FILES)
        (tmp_path / "org" / "name").mkdir(parents=True)
        (tmp_path / "org" / "name" / "a.gguf").touch()
        assert resolve("org/name").weights == tmp_path / "org" / "name" / "a.gguf"
        assert hub.asked == []

    def test_the_token_goes_to_the_hub_only(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        hub.gated.add("org/name")
        monkeypatch.setenv("HF_TOKEN", hub.token)
        resolve("org/name")
        assert {one.token for one in hub.asked if one.path.startswith("/org")} == {f"Bearer {hub.token}"}
        assert {one.token for one in hub.asked if one.path.startswith("/storage")} == {None}


def test_a_transfer_by_xet_counts_each_byte_once() -> None:
    """With the library's own reporter of Xet, which has another number for the bytes on the wire."""
    said: list[int] = []
    progress = TransferProgress(lambda stage, done, total: said.append(done), 10)
    bars = XetDownloadProgressReporter(
        reconstruction_desc="x", total=10, log_level=30, tqdm_class=bar_of(progress)
    )
    for done, sent in ((4, 3), (10, 7)):
        bars.update_progress(
            SimpleNamespace(
                total_bytes=10, total_bytes_completed=done, total_bytes_completion_rate=None,
                total_transfer_bytes_completed=sent, total_transfer_bytes_completion_rate=1.0,
            )
        )  # fmt: skip
    bars.close()
    assert said == [4, 10]


@pytest.mark.usefixtures("any_family")
class TestBrokenTransfers:
    def test_a_break_is_resumed_at_once(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        hub.cut["model.safetensors"] = [4000, 3000]
        assert contents(resolve("org/name"))["model.safetensors"] == FILES["model.safetensors"]
        ranges = [
            one.range for one in hub.asked if one.path.endswith("model.safetensors") and one.method == "GET"
        ]
        assert ranges[:1] == [None]
        starts = [int(re.findall(r"\d+", one)[0]) for one in ranges if one]
        assert len(set(starts)) == 2
        assert 3400 < min(starts) < 4001

    def test_another_try_goes_on_where_the_last_stopped(self, hub: StandIn, tmp_path: Path) -> None:
        hub.put("org/name", FILES)
        hub.cut["model.safetensors"] = [6000, *itertools.repeat(0, 20)]
        assert "run the command again: it goes on where it stopped" in fails("org/name")
        (left,) = tmp_path.glob("cache/models--org--name/blobs/*.unfinished")
        kept = left.stat().st_size
        assert 5400 < kept <= 6000
        hub.cut.clear()
        hub.asked.clear()
        assert contents(resolve("org/name"))["model.safetensors"] == FILES["model.safetensors"]
        asked = [one.range for one in hub.asked if one.path.startswith("/storage")]
        assert asked == [f"bytes={kept}-"]
        assert not left.exists()

    def test_a_server_without_ranges_sends_all_again(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        hub.cut["model.safetensors"] = [6000]
        hub.ignores_ranges = True
        assert contents(resolve("org/name"))["model.safetensors"] == FILES["model.safetensors"]

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
    def test_a_wrong_hash_is_refused_and_never_in_the_cache(
        self, hub: StandIn, tmp_path: Path, file: str
    ) -> None:
        hub.put("org/name", FILES)
        hub.spoilt.add(file)
        message = fails("org/name")
        assert message.startswith(f"{file} of org/name has the hash ")
        assert "it was deleted: run the command again" in message
        blobs = [path.read_bytes() for path in tmp_path.glob("cache/models--org--name/blobs/*")]
        assert not any(content[:99] == FILES[file][:99] for content in blobs)
        hub.spoilt.clear()
        assert contents(resolve("org/name"))[file] == FILES[file]

    def test_a_file_that_rots_in_the_cache(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        weights = resolve("org/name").weights / "model.safetensors"
        blob = weights.resolve()
        blob.write_bytes(blob.read_bytes()[:-1])
        assert (
            contents(resolve("org/name"))["model.safetensors"] == FILES["model.safetensors"]
        )  # another size
        blob.write_bytes(b"?" + blob.read_bytes()[1:])
        resolve("org/name")  # its size fits, and it is not hashed at every start
        assert "has the hash" in fails("org/name", rehash=True)
        assert contents(resolve("org/name"))["model.safetensors"] == FILES["model.safetensors"]


@pytest.mark.usefixtures("any_family")
class TestWithoutTheHub:
    def test_the_cache_is_enough(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES, cardData={"license": "mit"})
        first = resolve("org/name")
        said: list[str] = []
        hub.down = True
        assert resolve("org/name", report=lambda *one: said.append(one[0])) == first._replace(license=None)
        assert "the hub cannot be reached: the files of the cache are used" in said
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens
        assert resolve("org/name").weights == first.weights
        hub.asked.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        assert resolve("org/name", rehash=True).weights == first.weights
        assert resolve("org/name", config_only=True).weights == first.weights
        assert hub.asked == []
        assert "HF_HUB_OFFLINE forbids to fetch it: run `dsa pull org/other`" in fails("org/other")

    def test_a_chosen_file(self, hub: StandIn) -> None:
        hub.put("org/name", {f"x-{kind}.gguf": kind.encode() * 1000 for kind in ("Q8_0", "Q4_K_M")})
        first = resolve("org/name:Q8_0")
        hub.down = True
        assert resolve("org/name:Q8_0") == first
        assert "no GGUF file Q4_K_M" in fails("org/name:Q4_K_M")

    def test_a_rotten_file_is_found(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        blob = (resolve("org/name").weights / "model.safetensors").resolve()
        blob.write_bytes(b"?" + blob.read_bytes()[1:])
        hub.down = True
        assert "has the hash" in fails("org/name", rehash=True)

    def test_what_is_not_whole_is_not_served(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        hub.spoilt.add("model.safetensors")
        fails("org/name")
        hub.down = True
        message = fails("org/name")
        assert "neither a file or folder here nor in the cache" in message
        assert "(HTTP 503): check the network, or set HF_ENDPOINT to a mirror" in message


@pytest.mark.usefixtures("any_family")
class TestSentences:
    def test_no_such_repository(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        assert fails("org/nmae") == (
            f"org/nmae is no file or folder here, and {hub.url} has no model of that name to see without a token: check "
            "the name; a private one needs HF_TOKEN"
        )
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert fails("org/nmae").endswith(
            "with the token that is set: check the name, or the rights of the token"
        )
        assert "no name of the hub" in fails("org/a--b")

    def test_no_such_revision(self, hub: StandIn) -> None:
        hub.put("org/name", FILES)
        assert fails("org/name@v9").startswith("org/name has no revision 'v9'; its branches")

    def test_gated(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        hub.gated.add("org/name")
        page = f"{hub.url}/org/name"
        assert fails("org/name") == (
            f"org/name is gated: ask for access at {page}, then set HF_TOKEN to a token of that account"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        assert fails("org/name").startswith("org/name is gated, and the token (HF_TOKEN) is not let in")

    def test_pickles_only(self, hub: StandIn) -> None:
        hub.put("org/name", {name: FILES[name] for name in ("config.json", "pytorch_model.bin")})
        assert "use a repository with safetensors" in fails("org/name")
        assert hub.sent == []

    def test_no_room(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        usage = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "make room, or set HF_HOME to a folder on another disk" in fails("org/name")
        assert "model.safetensors" not in hub.sent

    def test_a_file_too_large_for_plain_http(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 5000)
        message = fails("org/name")
        assert message.startswith(
            "model.safetensors of org/name has 0 GiB, which this hub does not send without Xet"
        )

    def test_a_size_that_does_not_fit(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        content = StandIn._content
        monkeypatch.setattr(
            StandIn, "_content",
            lambda self, request, name, whole, headers: content(self, request, name, whole[:-3], headers),
        )  # fmt: skip
        assert "should be of size" in fails("org/name")

    def test_an_adapter(self, hub: StandIn) -> None:
        hub.put("org/name", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 5000})
        assert "is an adapter (LoRA)" in fails("org/name")

    def test_no_hub(self, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put("org/name", FILES)
        monkeypatch.setattr(
            StandIn, "_list", lambda self, request, *rest: self._content(request, "", b"<html>", {})
        )
        assert fails("org/name") == f"{hub.url} does not answer as a hub: check HF_ENDPOINT"


@pytest.mark.process
class TestWhatTheEngineServes:
    def test_another_family_is_refused_after_its_config(self, hub: StandIn) -> None:
        hub.put("org/name", FILES | {"config.json": b'{"model_type": "mamba"}'})
        message = fails("org/name")
        assert message.startswith(
            "config.json of org/name has model_type 'mamba', which is not supported; supported: "
        )
        assert hub.sent == ["config.json"]

    def test_another_quantisation_too(self, hub: StandIn) -> None:
        config = {"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}
        hub.put("org/name", FILES | {"config.json": json.dumps(config).encode()})
        assert "quantised weights with quant_method 'awq', which are not supported" in fails("org/name")
        assert hub.sent == ["config.json"]

    def test_the_hub_knows_the_architecture_of_gguf_files(self, hub: StandIn) -> None:
        hub.put("org/name", {"a.gguf": b"GGUF" * 999}, gguf={"architecture": "mamba"})
        assert fails("org/name").startswith(
            "org/name has architecture 'mamba', which is not supported; supported: llama"
        )
        assert hub.sent == []
