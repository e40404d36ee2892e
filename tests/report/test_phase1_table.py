"""The table of what phase 1 of CVFP came to, over seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import exit_code, write_run

from newllm.report.phase1 import main


def contexts(converged: int, rank: float) -> dict[str, Any]:
    """Facts of a phase 1 as a run records them; validation has a tenth of the positions."""
    found = {}
    for text, total in (("train", 2000), ("validation", 200)):
        count = converged * total // 2000
        found[text] = {
            "converged_share": f"{count / total:.1%} ({count}/{total})",
            "fixed_point_loss": 0.002 if text == "train" else 0.003,
            "diversity_loss": 0.5,
            "effective_rank": {"uncentred": f"{rank / 32:.1%} ({rank:.1f}/32)", "centred": "50.0% (16.0/32)"},
        }
    return found


def write_cvfp(folder: Path, *, seed: int, loss: str, converged: int, rank: float, iterations: int = 40) -> None:
    phase1 = {"iterations": iterations, "contexts": contexts(converged, rank)}
    config = {"trainer": {"kind": "cvfp"}, "loss": {"name": loss}}
    write_run(folder, seed=seed, config=config, phase1=phase1)
    facts = json.loads((folder / "run.json").read_text())
    facts["metrics"] |= {"val/perplexity": 100.0 + 10 * seed, "val/accuracy": 0.2}
    (folder / "run.json").write_text(json.dumps(facts))


def rows(told: str) -> dict[str, dict[str, str]]:
    """Cells of a markdown table by configuration and column."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("|")
    ]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_every_figure_of_phase_1_and_of_its_predictions_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cvfp(tmp_path / "a0", seed=0, loss="odcm", converged=1800, rank=16.0)
    write_cvfp(tmp_path / "a1", seed=1, loss="odcm", converged=1600, rank=24.0)
    write_cvfp(tmp_path / "b0", seed=0, loss="mcdl", converged=0, rank=8.0, iterations=7)

    assert main([str(tmp_path)]) == 0

    found = rows(capsys.readouterr().out)
    assert found["loss.name=odcm"] == {
        "configuration": "loss.name=odcm",
        "seeds": "2",
        "finished": "2/2",
        "converged, train": "85.0% (3,400/4,000)",
        "converged, validation": "85.0% (340/400)",
        "effective rank, train": "62.5 +- 17.7% (20.0/32)",
        "effective rank, validation": "62.5 +- 17.7% (20.0/32)",
        "fixed-point loss, train": "0.002 +- 0",
        "fixed-point loss, validation": "0.003 +- 0",
        "diversity loss, train": "0.5 +- 0",
        "diversity loss, validation": "0.5 +- 0",
        "iterations": "40",
        "val/perplexity": "105 +- 7.071",
        "val/accuracy": "0.2000 +- 0.0000",
    }
    assert found["loss.name=mcdl"]["converged, train"] == "0.0% (0/2,000)"
    assert found["loss.name=mcdl"]["iterations"] == "7"


def test_a_phase_1_alone_and_one_left_out_are_told_as_far_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "alone", config={"trainer": {"kind": "cvfp_phase1"}}, contexts=contexts(1000, 8.0))
    write_run(tmp_path / "without", config={"trainer": {"kind": "cvfp_phase2"}}, phase1="untrained")
    write_run(tmp_path / "other", config={"trainer": {"kind": "lct"}})

    assert main([str(tmp_path)]) == 0

    found = rows(capsys.readouterr().out)
    assert sorted(found) == ["trainer=cvfp_phase1", "trainer=cvfp_phase2"]
    assert found["trainer=cvfp_phase1"]["effective rank, validation"] == "25.0% (8.0/32)"
    assert found["trainer=cvfp_phase1"]["iterations"] == "20"
    assert found["trainer=cvfp_phase2"]["converged, train"] == "-"
    assert found["trainer=cvfp_phase2"]["iterations"] == "0"


def test_runs_without_a_phase_1_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")

    assert exit_code(main, [str(tmp_path)]) == 2
    assert "none of 1 run has finished a phase 1. Allowed: at least one finished run" in capsys.readouterr().err
