"""The picture of context norms, and what norms did before a loss spiked."""

import json
import math
from pathlib import Path

import pytest
from made_runs import exit_code, write_run

from newllm.report.collect import RunCurves, collect
from newllm.report.contexts import LEAD_STEPS, draw_contexts, excursion, lead, main, norm_table, spike_steps
from newllm.report.groups import group_runs

STEPS = 120
SPIKES = (40, 41, 80, 110)  # the second belongs to the first


def write_curves(folder: Path, *, seed: int = 0, grows: bool = True, update: str | None = "additive") -> Path:
    """A run with spikes; where it grows, the norm rises in the steps before them and falls back after."""
    guards = {"spike_window": 20, "spike_deviations": 6}
    model = {"kind": "transformer"} if update is None else {"kind": "new_llm", "update": update}
    write_run(folder, seed=seed, config={"guards": guards, "model": model})
    lines = []
    for step in range(1, STEPS + 1):
        ahead = min((spike - step for spike in SPIKES if spike >= step), default=STEPS)
        line = {"step": step, "tokens": step, "train/loss": 3.0 + 0.01 * math.sin(step) + 2.0 * (step in SPIKES)}
        line["optim/grad_norm"] = 1.0 + 0.1 * math.cos(step)
        if update is not None:
            norm = 2.0 if grows and ahead <= LEAD_STEPS // 2 else 1.0
            line |= {"context/norm_mean": norm, "context/norm_max": 3 * norm}
        lines.append(line)
    lines.append({"step": STEPS, "tokens": STEPS, "val/loss": 2.0 + 0.1 * seed})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def only(folder: Path) -> RunCurves:
    (run,), _ = collect([folder])
    return run


def test_spikes_are_found_once_each(tmp_path: Path) -> None:
    assert spike_steps(only(write_curves(tmp_path / "a"))) == [40, 80, 110]


def test_growth_before_spikes_ranks_above_growth_elsewhere(tmp_path: Path) -> None:
    growing = lead(only(write_curves(tmp_path / "grows")), "context/norm_mean")
    still = lead(only(write_curves(tmp_path / "still", grows=False)), "context/norm_mean")

    assert (growing.spikes, growing.grew) == (3, 3)
    assert min(growing.ranks) > 0.8
    assert (still.spikes, still.grew) == (3, 0)


def test_a_norm_that_grows_all_the_time_is_no_sign_of_a_spike(tmp_path: Path) -> None:
    folder = write_curves(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["context/norm_mean"] = math.exp(line["step"] / 50 + 0.01 * math.sin(line["step"]))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    found = lead(only(folder), "context/norm_mean")

    assert found.grew == 3
    assert 0.1 < sum(found.ranks) / 3 < 0.9


def test_the_highest_loss_is_told_with_what_the_norm_did_before_it(tmp_path: Path) -> None:
    folder = write_curves(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[8] |= {"train/loss": 12.0}  # step 9
    for step in range(3, 9):
        lines[step - 1]["context/norm_mean"] = 0.5 * 2.0 ** (step - 3)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    found = excursion(only(folder))

    assert found is not None
    assert found.step == 9
    assert found.height == pytest.approx(12.0 / lines[0]["train/loss"])
    assert found.growth == 32  # from step 3 to step 8


def test_a_loss_that_only_falls_has_no_highest_to_tell(tmp_path: Path) -> None:
    folder = write_curves(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line["train/loss"] = 5 - line["step"] / 100
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    assert excursion(only(folder)) is None


def test_table_and_picture_hold_every_configuration(tmp_path: Path) -> None:
    for seed in range(2):
        write_curves(tmp_path / f"a{seed}", seed=seed)
        write_curves(tmp_path / f"t{seed}", seed=seed + 2, update=None)
    groups = group_runs(collect([tmp_path])[0], "val/loss")

    rows = {row[1]: row[2:] for row in norm_table(groups).rows}
    figure = draw_contexts(groups)

    assert rows["model=new_llm"][3] == "3/3"
    assert rows["model=new_llm"][4].startswith("6/6, rank 0.")
    assert rows["model=transformer"][1:3] == ["-", "-"]
    assert [len(axes.lines) for axes in figure.axes] == [
        4,
        8,
        2,
        4,
    ]  # a line a run; spikes are marked in the training loss


def test_the_command_writes_the_picture_and_refuses_runs_without_contexts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_curves(tmp_path / "with" / "a")
    write_curves(tmp_path / "without" / "a", update=None)

    assert main([str(tmp_path / "with")]) == 0
    assert exit_code(main, [str(tmp_path / "without")]) == 2

    assert (tmp_path / "with" / "contexts.png").read_bytes().startswith(b"\x89PNG")
    assert "none of 1 run has logged context/norm_mean. Allowed: at least one run" in capsys.readouterr().err
