"""Loss against mean steps of learned halting, beside fixed steps of the same model."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import exit_code, write_evaluation, write_run

from newllm.report.collect import collect
from newllm.report.halting import frontiers_of, halting_table, main


def write(folder: Path, seed: int, found: dict[str, Any], *, steps: int, halting: str, **model: Any) -> None:
    config = {
        "model": {"kind": "selective", "skip_interval": steps, "halting": halting, "carry": "projection"} | model,
        "loss": {"kind": "halting" if halting == "learned" else "fixed_skip"},
        "evaluation": {"perplexity": {"kind": "perplexity"}},
    }
    place = write_run(folder, seed=seed, config=config, flops_per_token=1000 * steps)
    write_evaluation(place, found)


def learned(*lines: tuple[float, float, float]) -> dict[str, Any]:
    """Quantile, mean steps and loss of each threshold."""
    by_threshold = [{"quantile": q, "threshold": q, "mean_steps": steps, "loss": loss} for q, steps, loss in lines]
    return {"halting": {"weighted": {"mean_steps": 1.5, "loss": 2.9}, "by_threshold": by_threshold}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Fixed steps lose 3.0 and 2.0 at one and three steps; seed 1 is 0.5 worse throughout."""
    for seed in (0, 1):
        worse = 0.5 * seed
        lines = (0.0, 1.0, 3.1), (0.4, 1.0, 3.1), (0.5, 2.0, 2.4 + 0.1 * seed), (1.0, 3.0, 2.0)
        found = learned(*((t, steps, loss + worse) for t, steps, loss in lines))
        write(tmp_path / f"learned_{seed}", seed, found, steps=3, halting="learned")
        for steps, loss in ((1, 3.0), (3, 2.0)):
            fixed = {"perplexity": {"loss": loss + worse}}
            write(tmp_path / f"fixed_{steps}_{seed}", seed, fixed, steps=steps, halting="fixed")
            write(tmp_path / f"pause_{steps}_{seed}", seed, fixed, steps=steps, halting="fixed", carry="pause")
    return tmp_path


def test_points_are_compared_with_the_line_of_fixed_steps_by_seed(runs: Path) -> None:
    (frontier,) = frontiers_of(collect([runs])[0])

    assert [point.rule for point in frontier.points] == [
        "gate above 0% of gates",
        "gate above 50% of gates",
        "gate above 100% of gates",
    ]
    first, between, last = map(frontier.above_fixed, frontier.points)
    assert first is not None
    assert between is not None
    assert last is not None
    assert first.mean == pytest.approx(0.1)
    # The line is at 2.5 and 3.0 at two steps; the model at 2.4 and 3.0.
    assert between.mean == pytest.approx((-0.1 + 0.0) / 2)
    assert last.mean == pytest.approx(0)


def test_only_fixed_steps_of_the_same_model_are_compared(runs: Path) -> None:
    (frontier,) = frontiers_of(collect([runs])[0])

    assert [point.rule for point in frontier.fixed] == ["at step 1", "at step 3"]
    assert frontier.fixed[0].loss == {0: 3.0, 1: 3.5}


def test_table_tells_what_every_rule_costs(runs: Path) -> None:
    table = halting_table(frontiers_of(collect([runs])[0]))

    flops = table.columns.index("FLOPs per emitted token")
    assert [row[flops] for row in table.rows] == ["3,000"] * 4 + ["1,000", "3,000"]
    assert [row[1] for row in table.rows][:2] == ["by shares", "gate above 0% of gates"]


def test_without_fixed_steps_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    write(tmp_path / "run", 0, learned((0.5, 2.0, 2.4)), steps=3, halting="learned")

    (frontier,) = frontiers_of(collect([tmp_path])[0])

    assert frontier.above_fixed(frontier.points[0]) is None


def test_command_prints_the_table_and_draws(runs: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(runs)]) == 0

    printed = capsys.readouterr().out
    assert "gate above 50% of gates" in printed
    assert "fixed steps" in printed
    assert (runs / "halting.png").read_bytes().startswith(b"\x89PNG")


def test_fixed_steps_measured_on_another_split_are_no_line_to_compare_with(
    runs: Path, capsys: pytest.CaptureFixture
) -> None:
    for seed in (0, 1):
        write_evaluation(runs / f"fixed_1_{seed}", {"perplexity": {"loss": 3.0}}, split="test")

    assert main([str(runs)]) == 0

    shown = capsys.readouterr()
    assert "at step 1" not in shown.out
    assert f"Run: python evaluate.py run={runs / 'fixed_1_0'} 'evaluation=[perplexity]'" in shown.err


def test_runs_without_the_measurement_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "run")

    assert exit_code(main, [str(tmp_path)]) == 2
    assert "none of 1 run has finished with evaluation=[halting]" in capsys.readouterr().err
