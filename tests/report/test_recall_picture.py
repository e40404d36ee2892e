"""The picture of accuracy against state bytes."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import write_run

from newllm.report.collect import collect
from newllm.report.groups import group_runs, memory_name
from newllm.report.recall import METRIC, draw_state_vs_recall, main, series_of


def write_probe(folder: Path, kernel: str | None, accuracy: float, *, seed: int = 0, **changes: Any) -> None:
    layers = (
        {"stack": ["pythia", "pythia"], "memory_kernel": "elu"}  # unused, but part of every run's configuration
        if kernel is None
        else {"stack": ["pythia", "infini"], "memory_kernel": kernel}
    )
    state_bytes, lr = changes.pop("state_bytes"), changes.pop("lr", 0.001)
    config = {"layers": layers | {"memory_heads": state_bytes}, "optimizer": {"lr": lr}}
    facts = {"metrics": {METRIC: accuracy}, "data": {"chance_accuracy": 0.25}} | changes
    write_run(folder, seed=seed, config=config, state_bytes=state_bytes, **facts)
    if facts.get("status") is None:
        path = folder / "metrics.jsonl"
        path.write_text(f'{{"step": 10, "tokens": 80, "{METRIC}": {accuracy}}}\n')


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two kernels at two sizes, two seeds of one of them, and attention."""
    write_probe(tmp_path / "a", "elu", 0.3, state_bytes=64)
    write_probe(tmp_path / "b", "elu", 0.5, state_bytes=64, seed=1)
    write_probe(tmp_path / "c", "elu", 0.1, state_bytes=16)
    write_probe(tmp_path / "d", "ridge", 0.9, state_bytes=128)
    write_probe(tmp_path / "e", "ridge", 0.2, state_bytes=128, lr=0.1)
    write_probe(tmp_path / "f", None, 1.0, state_bytes=512)
    return tmp_path


def drawn(sweep: Path) -> dict[str, list[tuple[float, float]]]:
    runs, _ = collect([sweep])
    series = series_of(group_runs(runs, METRIC))
    return {name: [(cost, mean) for cost, mean, _ in points] for name, points in series.items()}


def test_every_memory_is_a_line_over_its_bytes_at_its_best_setting(sweep: Path) -> None:
    assert drawn(sweep) == {
        "pythia": [(512, 1.0)],
        "pythia + infini, elu": [(16, 0.1), (64, pytest.approx(0.4))],
        "pythia + infini, ridge": [(128, 0.9)],
    }


def test_lines_and_chance_are_named(sweep: Path) -> None:
    axes = draw_state_vs_recall(collect([sweep])[0]).axes[0]

    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["chance 0.25", "pythia", "pythia + infini, elu", "pythia + infini, ridge"]
    assert axes.get_xlabel() == "state bytes per text after a row"


def test_stacks_are_named_by_their_kinds() -> None:
    assert memory_name({"layers.stack": ["infini", "infini", {"pythia": 4}], "layers.memory_kernel": "elu"}) == (
        "infini + pythia, elu"
    )
    assert memory_name({"model.kind": "trm"}) == "trm"


def test_the_command_writes_the_picture(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0

    assert (sweep / "state_vs_recall.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"picture: {sweep / 'state_vs_recall.png'}\n"


def test_runs_without_an_accuracy_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one", status="failed")

    assert main([str(tmp_path)]) == 2

    assert "report: none of 1 runs has finished with val/accuracy. Allowed: at least one." in capsys.readouterr().err
