"""A measurement that cannot be trusted, or cannot be made, is not written."""

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from bench import __main__ as command
from bench import measure, page, peers
from bench.apart import apart
from bench.measure import Found, NotWrittenError, Row, describe_load, paired_ratio, require_quiet, take_turns


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for figures and docs."""
    for module, name in ((measure, "RESULTS"), (measure, "DOCS"), (command, "DOCS"), (page, "RESULTS")):
        monkeypatch.setattr(module, name, tmp_path)
    monkeypatch.setattr(measure, "DEVICE", measure.DEVICE)
    monkeypatch.setattr(measure, "fitted", [])
    return tmp_path


def bench(monkeypatch: pytest.MonkeyPatch, run: Any, *arguments: str) -> int:
    """Exit code of the command when the bench of start-up does what `run` does."""
    monkeypatch.setattr(command.sys, "argv", ["bench", "startup", *arguments])
    monkeypatch.setitem(sys.modules, "bench.startup", type("Bench", (), {"run": staticmethod(run)}))
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_alternatives_take_turns_and_warm_up_apart() -> None:
    order: list[str] = []

    rows = take_turns({name: lambda n=name: order.append(n) for name in "ab"}, rounds=3, min_seconds=0, warmups=2)

    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert [len(row.seconds) for row in rows] == [3, 3]


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    assert paired_ratio(Row("slow", [2.0, 30.0, 4.0], 0), Row("fast", [1.0, 10.0, 1.0], 0)) == 3.0


def test_rounds_that_spread_too_far_are_refused_with_figures() -> None:
    require_quiet([Row("steady", [1.0, 1.1, 0.9, 1.0], 0)], "sizes")

    with pytest.raises(
        NotWrittenError, match=r"sizes: rounds spread by loud \d+% .*Allowed: at most 35%\. Nothing was"
    ):
        require_quiet([Row("steady", [1.0, 1.1, 0.9, 1.0], 0), Row("loud", [1.0, 3.0, 0.5, 2.0], 0)], "sizes")


def test_what_is_measured_is_written(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    about = {**measure.machine(), "device": "Some CPU(R) 9", "cores": 2, "torch": "2.x"}
    monkeypatch.setattr(command, "machine", lambda: about)

    assert bench(monkeypatch, lambda quick: Found("two\nlines", {"seconds": [1, 2]}, ("A circle", Figure()))) == 0

    written = json.loads((kept / "some_cpu_r_9_2_cores.json").read_text())
    assert written["startup"]["seconds"] == [1, 2]
    assert written["startup"]["machine"] == about
    text = (kept / "benchmarks.md").read_text()
    assert (
        "## Start-up\n\n`python -m bench startup`\n\n### Some CPU(R) 9, 2 cores\n\ntwo\nlines\n\n![A circle](" in text
    )
    assert (kept / "bench_startup_some_cpu_r_9_2_cores.png").exists()


def test_a_machine_replaces_its_own_figures_and_keeps_those_of_others(
    monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    for device, text in (("B", "old"), ("A", "kept"), ("B", "new")):
        about = {**measure.machine(), "device": device}
        monkeypatch.setattr(command, "machine", lambda about=about: about)
        assert bench(monkeypatch, lambda quick, text=text: Found(text, {})) == 0

    told = (kept / "benchmarks.md").read_text()
    assert "old" not in told
    assert told.index("kept") < told.index("new")
    assert told.count("## Start-up") == 1


def test_quick_writes_nothing(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    assert bench(monkeypatch, lambda quick: Found("text", {}), "--quick") == 0
    assert list(kept.iterdir()) == []


def test_docs_are_what_the_results_say() -> None:
    assert (measure.DOCS / "benchmarks.md").read_text() == page.page(command.BENCHES)
    found = [json.loads(path.read_text()) for path in measure.RESULTS.glob("*.json")]
    assert {name for by_bench in found for name in by_bench} <= set(command.BENCHES)
    pictures = {entry["picture"]["file"] for by_bench in found for entry in by_bench.values() if "picture" in entry}
    assert pictures == {path.name for path in measure.DOCS.glob("bench_*.png")}


def test_a_refused_measurement_is_not_written_and_the_load_before_is_told(
    monkeypatch: pytest.MonkeyPatch, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud(quick: bool) -> Found:
        raise NotWrittenError("rounds spread.")

    about = {**measure.machine(), "busy_before": 0.8, "load_before": 3.0, "cores": 2}
    monkeypatch.setattr(command, "machine", lambda: about)

    assert bench(monkeypatch, loud) == 1

    said = capsys.readouterr().err
    assert "startup: the machine is busy." in said
    assert "rounds spread. Before it began other programs took 80% of 2 cores, load 3.0." in said
    assert list(kept.iterdir()) == []


def test_out_of_memory_names_the_sizes_that_fitted(
    monkeypatch: pytest.MonkeyPatch, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(quick: bool) -> Found:
        require_quiet([Row("ours", [1.0, 1.0], 0)], "training, nano")
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    assert bench(monkeypatch, too_large) == 1

    said = capsys.readouterr().err
    assert "startup: out of memory (tried to allocate 9 GiB). Allowed: what fits, so far training, nano." in said
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("speed_of_all", "bench: speed_of_all does not exist here. Allowed: chunked_loss, "),
        ("--device=tpu", "bench --device: tpu does not exist here. Allowed: "),
        ("--fast", "bench: --fast does not exist here. Allowed: --device=<device>, --quick."),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.sys, "argv", ["bench", argument])

    with pytest.raises(SystemExit) as refused:
        command.main()

    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_peers_are_found_after_what_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "python3.11" / "site-packages"
    folder.mkdir(parents=True)
    (folder / "a_peer.py").write_text("")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    peers.put_on_path()
    peers.put_on_path()

    assert sys.path[-1] == str(folder)
    assert sys.path.count(str(folder)) == 1
    assert importlib.util.find_spec("a_peer") is not None


def test_load_is_told_in_words() -> None:
    told = describe_load(measure.machine())

    assert told.startswith("other programs took ")
    assert f" of {measure.machine()['cores']} cores, load " in told


@pytest.mark.slow  # two processes import torch
def test_a_process_apart_makes_calls_and_says_what_went_wrong(tmp_path: Path) -> None:
    with apart(partial, (tmp_path / "made").mkdir) as call:
        call()
        assert (tmp_path / "made").is_dir()
        with pytest.raises(RuntimeError, match="partial in a process of its own: FileExistsError: "):
            call()

    with apart(partial, os._exit, 3) as call, pytest.raises(RuntimeError, match="of its own: it ended"):
        call()
