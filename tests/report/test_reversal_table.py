"""The table of runs on facts in two directions, over seeds."""

from pathlib import Path

import pytest
from made_runs import exit_code, write_evaluation, write_run

from newllm.report.reversal import main


def evaluated(folder: Path, forward: float, backward: float | None, **of: str) -> None:
    reason = "not told: forward exact match 0.500 is not above 0.95"
    part = {
        "facts": 10,
        "forward": {"exact_match": forward},
        "backward": reason if backward is None else {"exact_match": backward, "p_value": backward / 10},
        "gap": reason if backward is None else 5.0,
    }
    write_evaluation(folder, {"reversal": {"one_way": part}}, **of)


def test_seeds_below_the_gate_are_counted_and_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, (forward, backward) in enumerate([(1.0, 0.2), (1.0, 0.4), (0.5, None)]):
        evaluated(write_run(tmp_path / str(seed), seed=seed), forward, backward)

    assert main([str(tmp_path)]) == 0

    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert cells[1:3] == ["one way (10)", "3"]
    assert cells[3] == "0.833 +- 0.29"
    assert cells[5] == "0.3 +- 0.14 (2 of 3)"
    assert cells[9] == "0.04"
    assert cells[11] == "5 +- 0 (2 of 3)"


def test_a_seed_measured_of_the_last_weights_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluated(write_run(tmp_path / "0"), 1.0, 0.2)
    evaluated(write_run(tmp_path / "1", seed=1), 1.0, 0.4, checkpoint="last")

    assert main([str(tmp_path)]) == 0

    shown = capsys.readouterr()
    cells = [cell.strip() for cell in shown.out.splitlines()[-1].strip("|").split("|")]
    assert (cells[2], cells[5]) == ("1", "0.2")
    assert f"Run: python evaluate.py run={tmp_path / '1'} 'evaluation=[reversal]'" in shown.err


def test_runs_without_the_measurement_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "run")

    assert exit_code(main, [str(tmp_path)]) == 2
    assert "none of 1 run has measured the reversal" in capsys.readouterr().err
