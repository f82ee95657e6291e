"""The comparison with other servers: the commands that it runs, and the tables that it makes from the results."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from benchmarks import curve, tables
from benchmarks.compare import Lengths, Peers, suites
from lab.bench.results import BenchResults, Sample, Server
from lab.bench.suites import Decode

WEIGHTS = Path("/models/a model.gguf")


def serves(arguments: list[str]) -> dict[str, list[str]]:
    """Return the servers of the --serve options: name -> command."""
    values = [value for flag, value in itertools.pairwise(arguments) if flag == "--serve"]
    return {name: shlex.split(command) for name, _, command in (value.partition("=") for value in values)}


def test_peers_are_run_with_their_settings_on_the_same_weights() -> None:
    found = suites(
        Peers("llama-server", "vllm/bin/python", "bf16", "tiny", WEIGHTS, "2-3", 2, "ov/bin/python")
    )
    one = serves(found["decode"])
    assert list(one) == ["dsa", "llama.cpp", "llama.cpp -fa on", "OpenVINO", "vLLM"]
    assert all(command[-2:] == ["--port", "{port}"] for command in one.values())
    assert one["llama.cpp"][:7] == ["llama-server", "-m", str(WEIGHTS), "-t", "2", "-np", "1"]
    assert one["llama.cpp -fa on"][one["llama.cpp -fa on"].index("-fa") + 1] == "on"
    assert "VLLM_CPU_OMP_THREADS_BIND=2-3" in one["vLLM"]
    assert one["OpenVINO"][0] == "ov/bin/python"
    assert Path(one["OpenVINO"][1]).is_file()
    assert one["OpenVINO"][2:6] == ["--model", str(WEIGHTS), "--threads", "2"]
    assert "OpenVINO" not in serves(found["concurrency"]), "it answers one request at a time"
    many = serves(found["concurrency"])["llama.cpp"]
    assert many[many.index("-c") + 1] == str(32 * 1280)


def test_a_peer_that_is_not_named_is_left_out() -> None:
    found = suites(Peers(None, None, None, "tiny", WEIGHTS, "1", 1))
    assert {name: list(serves(arguments)) for name, arguments in found.items()} == {
        key: ["dsa", "dsa dense"] if key == "long" else ["dsa"] for key in found
    }
    fields = found["long"][found["long"].index("--fields") + 1]
    assert fields == 'dsa dense={"dsa": {"top_k": "dense"}}'


@pytest.mark.parametrize(
    ("positions", "contexts", "prompts"),
    [
        (2048, (32, 512, 1024), (512, 512, 1024)),
        (8192, (128, 2048, 7168), (512, 2048, 7168)),
        (32_768, (512, 8192, 30_720), (512, 8192, 30_720)),
    ],
)
def test_lengths_fit_the_model(positions: int, contexts: tuple[int, ...], prompts: tuple[int, ...]) -> None:
    lengths = Lengths(positions)
    assert lengths.contexts == contexts
    assert lengths.prompts == prompts
    assert max(lengths.requests) + 64 <= positions
    assert lengths.longest + 512 + 1 <= positions, "a tail of `prefix` and a token"
    found = suites(Peers("llama-server", None, None, "tiny", WEIGHTS, "1", 1, positions=positions))
    for name in ("decode", "prefill", "prefix", "long"):
        sizes = [int(size) for size in found[name][1].split(",")]
        assert max(sizes) < positions
        one = serves(found[name])["llama.cpp"]
        assert one[one.index("-c") + 1] == str(positions), "its slot has room for the longest"


def test_an_indexer_may_be_named() -> None:
    peers = Peers(None, None, None, "tiny", WEIGHTS, "1", 1, overlay=Path("/an indexer"))
    command = serves(suites(peers)["decode"])["dsa"]
    assert command[command.index("--overlay") + 1] == "/an indexer"


def test_tables_are_made_of_the_results_and_written_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = BenchResults(
        suite="decode", title=Decode.title, axis=Decode.axis, metrics=list(Decode.metrics), own="dsa", command="dsa bench",
        started="2026-11-25T16:00:00Z", settings={"rounds": 2}, machine={"processor": "a processor"},
        servers=[Server(name=name, url=None, command=None, cpus=[1]) for name in ("dsa", "other")],
        samples=[
            Sample(server=name, case=128, turn=turn, values={"decode_rate": rate + turn}, requests=[])
            for name, rate in (("dsa", 60.0), ("other", 30.0)) for turn in range(2)
        ],
    )  # fmt: skip
    results.summarise()
    results.save(tmp_path)
    page = tmp_path / "measured.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr(tables, "MEASURED", page)
    monkeypatch.setattr("sys.argv", ["tables", str(tmp_path), "--write"])
    tables.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "a processor, servers on core 1, 2 rounds" in text
    assert "| 128 | **dsa** | 60.5 (60.2 to 60.8) | - | - | - | **1.98** |" in text
    assert "|  | other | 30.5 (30.2 to 30.8) | - | - | - |  |" in text
    with pytest.raises(SystemExit, match="has no results of dsa bench"):
        tables.tables(tmp_path / "nowhere")


def test_the_published_page_has_room_for_the_tables() -> None:
    text = tables.MEASURED.read_text("utf-8")
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1
    assert text.index(tables.BEGIN) < text.index(tables.END)


def test_the_pages_say_what_the_published_curve_says() -> None:
    report = curve.read()
    assert not report.quick
    assert curve.text_of(report) in curve.MEASURED.read_text("utf-8")


def test_the_curves_text_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{curve.BEGIN}\nold\n{curve.END}\nafter\n", "utf-8")
    curve.put(page, "new")
    assert page.read_text("utf-8") == f"before\n{curve.BEGIN}\nnew\n{curve.END}\nafter\n"
    page.write_text(f"before\n{curve.BEGIN}\n", "utf-8")
    with pytest.raises(SystemExit, match="has no <!-- curve: begin --> with"):
        curve.put(page, "new")
