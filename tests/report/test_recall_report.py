"""Accuracy against state bytes and by slice: which setting counts, what stands in the tables and in the picture."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import exit_code, write_evaluation, write_run

from newllm.config.compose import compose
from newllm.config.typed import plain
from newllm.report.collect import collect
from newllm.report.groups import memory_name
from newllm.report.probes import METRIC, Memory, Probe, probes_of
from newllm.report.recall import draw_state_vs_recall, main, recall_table, slice_tables


def write_probe(folder: Path, kernel: str | None, accuracy: float, *, seed: int = 0, **changes: Any) -> None:
    layers = (
        {"stack": ["pythia", "pythia"], "memory_kernel": "elu"}  # unused, but part of every run's configuration
        if kernel is None
        else {"stack": ["pythia", "infini"], "memory_kernel": kernel}
    )
    state_bytes, lr, kind = changes.pop("state_bytes"), changes.pop("lr", 0.001), changes.pop("kind", "mqar")
    measured, of = changes.pop("measured", {}), changes.pop("of", {})
    config = {
        "layers": layers | {"memory_heads": state_bytes},
        "optimizer": {"lr": lr},
        "data": {"kind": kind, "block_length": 8},
    }
    facts = {"metrics": {METRIC: accuracy}, "data": {"chance_accuracy": 0.25, "fingerprint": kind}} | changes
    write_run(folder, seed=seed, config=config, state_bytes=state_bytes, **facts)
    if facts.get("status") is None:
        path = folder / "metrics.jsonl"
        path.write_text(f'{{"step": 10, "tokens": 80, "{METRIC}": {accuracy}}}\n')
    write_evaluation(folder, {"recall": {"accuracy": accuracy, **measured}}, **of)


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


def read(folder: Path) -> list[Probe]:
    return probes_of(collect([folder])[0])


def only(folder: Path, name: str) -> tuple[Probe, Memory]:
    """The only probe, and its only memory of that name."""
    (probe,) = read(folder)
    (memory,) = [memory for memory in probe.memories if memory.name == name]
    return probe, memory


def test_every_memory_is_read_over_its_bytes_at_its_best_setting(sweep: Path) -> None:
    (probe,) = read(sweep)

    assert [(memory.name, memory.state_bytes, memory.accuracies, memory.tried) for memory in probe.memories] == [
        ("pythia", 512, {0: 1.0}, 1),
        ("pythia + infini, elu", 16, {0: 0.1}, 1),
        ("pythia + infini, elu", 64, {0: 0.3, 1: 0.5}, 1),
        ("pythia + infini, ridge", 128, {0: 0.9}, 2),
    ]
    assert (probe.name, probe.chance) == ("mqar", 0.25)


def test_a_rate_is_chosen_on_the_seeds_that_all_rates_have(tmp_path: Path) -> None:
    # The mean of the better rate over its three seeds is below the one seed of the other: that is luck, not a better rate.
    for rate, accuracies in {0.002: (0.8, 0.5, 0.2), 0.001: (0.7,)}.items():
        for seed, accuracy in enumerate(accuracies):
            write_probe(tmp_path / f"{rate}_{seed}", "elu", accuracy, seed=seed, state_bytes=64, lr=rate)

    memory = only(tmp_path, "pythia + infini, elu")[1]

    assert (memory.settings["optimizer.lr"], memory.accuracies) == (0.002, {0: 0.8, 1: 0.5, 2: 0.2})


def test_of_equally_good_rates_that_with_more_seeds_counts(tmp_path: Path) -> None:
    write_probe(tmp_path / "a", "elu", 1.0, state_bytes=64, lr=0.001)
    for seed in range(2):
        write_probe(tmp_path / f"b{seed}", "elu", 1.0 - seed, seed=seed, state_bytes=64, lr=0.002)

    assert only(tmp_path, "pythia + infini, elu")[1].settings["optimizer.lr"] == 0.002


def test_kernels_are_compared_with_the_papers_at_equal_bytes_only(tmp_path: Path) -> None:
    for seed in range(3):
        write_probe(tmp_path / f"elu{seed}", "elu", 0.1 * seed, seed=seed, state_bytes=1000)
        write_probe(tmp_path / f"centred{seed}", "centred", 0.5 + 0.1 * seed, seed=seed, state_bytes=1016)
        write_probe(tmp_path / f"ridge{seed}", "ridge", 0.9, seed=seed, state_bytes=2000)

    probe = read(tmp_path)[0]

    gains = {memory.name.split(", ")[1]: probe.gain(memory) for memory in probe.memories}
    assert gains["elu"] is None
    assert gains["ridge"] is None
    assert gains["centred"] is not None
    assert gains["centred"].mean == pytest.approx(0.5)
    lines = {row[1]: row for row in recall_table(probe).rows}
    centred = ["1,016", "1", "0,1,2", "0.6000 (0.5217 .. 0.6783)", "+0.5000 (+0.5000 .. +0.5000)"]
    assert [lines["pythia + infini, centred"][place] for place in (2, 4, 5, 6, 9)] == centred
    assert lines["pythia + infini, ridge"][9] == "-"


def test_probes_of_other_rows_stand_apart(sweep: Path) -> None:
    write_probe(sweep / "g", "elu", 0.7, state_bytes=64, kind="passkey")

    probes = read(sweep)

    assert [probe.name for probe in probes] == ["mqar", "passkey"]
    assert [memory.accuracies for memory in probes[1].memories] == [{0: 0.7}]
    assert len(draw_state_vs_recall(probes).axes) == 2


def answers(shift: float) -> dict[str, Any]:
    """An evaluation of rows of 8 and of 16 tokens, right more often by `shift`."""
    near = {"segments": "1", "accuracy": 0.5 + shift, "targets": 30, "memory_off": 0.25, "other_memory": 0.125}
    far = {"segments": "2-3", "accuracy": 0.25 + shift, "targets": 60, "memory_off": 0.25, "other_memory": 0.0}
    knocked_out = {"memory_off": {"accuracy": 0.25}, "other_memory": {"accuracy": 0.0625}}
    return {**knocked_out, "by_segments": [near], "by_block_length": [{"block_length": 16, "by_segments": [near, far]}]}


def test_accuracy_stands_beside_the_knock_outs_of_the_same_weights(tmp_path: Path) -> None:
    # The last weights answer more than the best ones, of which the memory was knocked out.
    write_probe(tmp_path / "a", "elu", 0.75, state_bytes=64, measured={"accuracy": 0.5, **answers(0.0)})

    (row,) = recall_table(read(tmp_path)[0]).rows

    assert row[6:9] == ["0.5000", "0.2500", "0.0625"]


@pytest.mark.parametrize("of", [{"split": "test"}, {"checkpoint": "last"}, {"checkpoint": None}])
def test_a_run_measured_of_something_else_is_left_out_by_name(
    sweep: Path, capsys: pytest.CaptureFixture[str], of: dict[str, Any]
) -> None:
    write_probe(sweep / "g", "elu", 0.9, state_bytes=64, seed=2, of=of)

    assert main([str(sweep)]) == 0

    shown = capsys.readouterr()
    assert "0.4000 (0.3075 .. 0.4925)" in shown.out  # of the two seeds as before
    told = {"checkpoint": "best", "split": "validation"} | of
    assert f"left out: {sweep / 'g'}: {sweep / 'g' / 'evaluation.json'}: was measured with " in shown.err
    assert (
        f"with checkpoint={told['checkpoint']}, split={told['split']}. Allowed: checkpoint=best, split=val" in shown.err
    )
    assert f"Run: python evaluate.py run={sweep / 'g'} 'evaluation=[recall]'" in shown.err


def test_a_run_of_plain_text_is_not_told_to_measure_a_recall_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_run(tmp_path / "text") / "config.yaml").write_text(yaml.safe_dump(plain(compose([]))))

    assert exit_code(main, [str(tmp_path)]) == 2

    assert (
        "has not been measured with evaluation=[recall]. It cannot be: evaluation=[recall]: measures a recall probe, "
        "data of kind bible ask for nothing.\n"
    ) in capsys.readouterr().err


def test_slices_stand_by_length_and_bucket_with_intervals_over_seeds(tmp_path: Path) -> None:
    for seed in range(2):
        write_probe(tmp_path / str(seed), "elu", 0.5, seed=seed, state_bytes=64, measured=answers(0.25 * seed))

    (table,) = slice_tables(read(tmp_path)[0])

    assert (table.title, list(table.columns[3:])) == (
        "mqar by segments",
        ["row tokens", "segments", "targets", "accuracy", "memory off", "another's memory"],
    )
    near = ["0.6250 (0.5094 .. 0.7406)", "0.2500 (0.2500 .. 0.2500)", "0.1250 (0.1250 .. 0.1250)"]
    assert [list(row[3:]) for row in table.rows[:2]] == [["8", "1", "30", *near], ["16", "1", "30", *near]]
    assert list(table.rows[2][3:7]) == ["16", "2-3", "60", "0.3750 (0.2594 .. 0.4906)"]
    (row,) = recall_table(read(tmp_path)[0]).rows
    assert [cell.split(" ")[0] for cell in row[7:9]] == ["0.2500", "0.0625"]


def test_answers_that_were_right_before_have_a_column(tmp_path: Path) -> None:
    twice = {"written": "twice", "accuracy": 0.25, "outdated_share": 0.5, "targets": 8}
    write_probe(tmp_path / "a", "elu", 0.5, state_bytes=64, measured={"by_written": [twice]})

    (table,) = slice_tables(read(tmp_path)[0])

    assert (list(table.columns[4:]), list(table.rows[0][4:])) == (
        ["written", "targets", "accuracy", "old value"],
        ["twice", "8", "0.2500", "0.5000"],
    )


def test_buckets_that_one_seed_lacks_are_left_out(tmp_path: Path) -> None:
    write_probe(tmp_path / "a", "elu", 0.5, state_bytes=64, measured=answers(0.0))
    shorter = {name: value for name, value in answers(0.0).items() if name != "by_block_length"}
    write_probe(tmp_path / "b", "elu", 0.5, seed=1, state_bytes=64, measured=shorter)

    assert [entry.bucket.block_length for entry in only(tmp_path, "pythia + infini, elu")[1].slices()] == [8]


def test_lines_and_chance_are_named(sweep: Path) -> None:
    axes = draw_state_vs_recall(read(sweep)).axes[0]

    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["chance 0.25", "pythia", "pythia + infini, elu", "pythia + infini, ridge"]
    assert axes.get_xlabel() == "state bytes per text after a row"


def test_the_axis_begins_where_the_smallest_state_is(sweep: Path) -> None:
    axes = draw_state_vs_recall(read(sweep)).axes[0]

    smallest, largest = (pick(memory.state_bytes for memory in read(sweep)[0].memories) for pick in (min, max))
    assert smallest >= 1
    assert smallest / 2 < axes.get_xlim()[0] < smallest
    assert largest < axes.get_xlim()[1] < 2 * largest


def test_points_carry_the_interval_over_seeds(sweep: Path) -> None:
    axes = draw_state_vs_recall(read(sweep)).axes[0]

    (elu,) = [drawn for drawn in axes.containers if drawn.get_label() == "pythia + infini, elu"]
    assert elu.lines[0].get_xydata().tolist() == [[16, pytest.approx(0.1)], [64, pytest.approx(0.4)]]
    ends = [[tuple(end) for end in bar] for bar in elu.lines[2][0].get_segments()]
    assert ends[1] == [(64, pytest.approx(0.3075)), (64, pytest.approx(0.4925))]


def test_stacks_are_named_by_their_kinds() -> None:
    assert memory_name({"layers.stack": ["infini", "infini", {"pythia": 4}], "layers.memory_kernel": "elu"}) == (
        "infini + pythia, elu"
    )
    assert memory_name({"model.kind": "trm"}) == "trm"


def test_the_command_tells_and_draws(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0

    assert (sweep / "state_vs_recall.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert shown.startswith("mqar: accuracy\n")
    assert "0.4000 (0.3075 .. 0.4925)" in shown
    assert "Guessing: 0.2500." in shown
    assert shown.endswith(f"picture: {sweep / 'state_vs_recall.png'}\n")


def test_seeds_measured_with_other_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, rows in ((0, 256), (1, 8)):
        made_with = {"recall": {"num_blocks": rows, "batch_size": 1 + seed}}
        of = {"made_with": made_with}
        write_probe(tmp_path / f"{seed}", "elu", 0.3, state_bytes=64, seed=seed, of=of)

    assert exit_code(main, [str(tmp_path)]) == 2

    said = capsys.readouterr().err
    assert (
        f"{tmp_path / '1'}: evaluation=[recall] was made with num_blocks=8, in {tmp_path / '0'}, which differs" in said
    )
    (tmp_path / "1" / "evaluation.json").write_text((tmp_path / "0" / "evaluation.json").read_text())
    assert exit_code(main, [str(tmp_path)]) == 0
    assert exit_code(main, [str(tmp_path), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written (Is a directory)" in capsys.readouterr().err


def test_runs_of_plain_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "one", config={"data": {"kind": "stdlib"}}, metrics={METRIC: 0.4})
    write_evaluation(folder, {"perplexity": {"accuracy": 0.4}})

    assert exit_code(main, [str(tmp_path)]) == 2

    assert "report: none of 1 run has finished with evaluation=[recall]." in capsys.readouterr().err
    assert not (tmp_path / "state_vs_recall.png").exists()


def test_runs_that_have_not_finished_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one", status="failed")

    assert exit_code(main, [str(tmp_path)]) == 2

    assert (
        "report: none of 1 run has finished with evaluation=[recall]. Allowed: at least one." in capsys.readouterr().err
    )
