import csv
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import exit_code, write_comparison, write_run

from newllm.report.__main__ import main
from newllm.report.collect import collect
from newllm.report.groups import Group, group_runs
from newllm.report.pictures import pareto_front
from newllm.report.statistics import interval, mean_and_deviation, paired_difference
from newllm.report.tables import cost_table, difference_table, guard_table, result_table, runs_table, settings_table


def groups_of(folder: Path, metric: str = "val/loss") -> list[Group]:
    return group_runs(collect([folder])[0], metric)


def test_mean_and_deviation_by_hand() -> None:
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)


def test_bootstrap_of_two_values_by_hand() -> None:
    """Resamples of (0, 1) have means 0, 1/2, 1/2, 1; the 2.5 % quantile lies 0.075 of the way from 0 to 1/2."""
    assert interval([0.0, 1.0]) == (pytest.approx(0.0375), pytest.approx(0.9625))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [interval(list(generator.normal(size=30))) for _ in range(60)]

    covered = sum(low <= 0.0 <= high for low, high in intervals) / len(intervals)
    assert covered > 0.85  # 95 % +- 4 standard errors of 60 trials, less the known shortfall of small samples


def test_difference_is_paired_by_the_seeds_of_both() -> None:
    found = paired_difference({0: 2.1, 1: 2.7, 5: 9.0}, {0: 2.0, 1: 2.5, 2: 0.0})

    assert found is not None
    assert found.seeds == (0, 1)
    assert found.mean == pytest.approx(0.15)
    assert found.low is not None
    assert 0.1 <= found.low < 0.15
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 2.0}, {0: 1.0})
    assert single is not None
    assert (single.mean, single.low) == (1.0, None)


def test_runs_that_differ_only_in_seed_and_place_are_one_group(tmp_path: Path) -> None:
    groups = groups_of(write_comparison(tmp_path))

    assert [(group.letter, group.label, len(group.runs)) for group in groups] == [
        ("A", "model=infini", 3),
        ("B", "model=pythia", 3),
    ]


def test_label_holds_the_fewest_settings_that_tell_groups_apart(tmp_path: Path) -> None:
    """dim follows from the model and heads from both: kinds come first, then what the user typed."""
    for model, dim, lr in (("infini", 8, 0.1), ("infini", 8, 0.2), ("pythia", 16, 0.1)):
        config = {"model": {"kind": model, "dim": dim, "heads": dim // 4}, "warmup": int(lr * 10), "lr": lr}
        write_run(tmp_path / f"{model}{lr}", config=config, overrides=[f"lr={lr}"], losses=(lr,))

    labels = [group.label for group in groups_of(tmp_path)]
    assert sorted(labels) == ["model=infini lr=0.1", "model=infini lr=0.2", "model=pythia lr=0.1"]


def test_result_table_by_hand(tmp_path: Path) -> None:
    groups = groups_of(write_comparison(tmp_path))

    rows = result_table(groups, "val/loss").rows

    assert rows[0][:5] == ["A", "model=infini", "3", "3/3", "2.5000 +- 0.5000"]
    assert rows[1][:5] == ["B", "model=pythia", "3", "3/3", "2.7000 +- 0.6000"]


def test_difference_table_by_hand(tmp_path: Path) -> None:
    groups = groups_of(write_comparison(tmp_path))

    (row,) = difference_table(groups, "val/loss", groups[0]).rows

    assert row[:3] == ["B", "model=pythia", "+0.2000"]
    assert row[4:] == ["3", "0,1,2"]
    low, high = map(float, row[3].split(" .. "))
    assert 0.1 <= low < 0.2 < high <= 0.3


def test_only_finished_runs_count_and_the_later_of_two_with_one_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "first", losses=(5.0,))
    write_run(tmp_path / "again", losses=(3.0,), started="2026-02-01T00:00:00")
    write_run(tmp_path / "died", seed=1, losses=(1.0,), status="failed")

    (group,) = groups_of(tmp_path)

    assert group.values("val/loss") == {0: 3.0}
    assert result_table([group], "val/loss").rows[0][2:5] == ["1", "2/3", "3.0000"]
    assert [row[2] for row in runs_table([group], "val/loss").rows] == ["finished", "finished", "failed"]


def test_several_runs_of_one_seed_are_told_as_runs_of_one_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(3):
        write_run(tmp_path / f"finished_{place}")
    write_run(tmp_path / "stopped", status="stopped")

    assert main([str(tmp_path)]) == 0

    told = capsys.readouterr().out
    assert (
        "4 runs of 1 configuration (3 finished, 1 stopped); of finished runs with the same seed the last one counts\n"
        in told
    )


def test_settings_table_shows_only_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config={"model": {"kind": "infini", "banks": 2}, "same": 1}, losses=(1.0,))
    write_run(tmp_path / "b", config={"model": {"kind": "pythia"}, "same": 1}, losses=(2.0,))

    table = settings_table(groups_of(tmp_path))

    assert [*table.columns] == ["", "model.kind", "model.banks"]
    assert table.rows == [["A", "infini", "2"], ["B", "pythia", "-"]]


def test_a_cost_that_one_run_does_not_know_is_no_mean_of_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, wall_seconds=None)

    runs, unreadable = collect([tmp_path])
    table = cost_table(group_runs(runs, "val/loss"))

    assert unreadable == []
    assert (table.rows[0][table.columns.index("wall seconds")], table.rows[0][2]) == ("-", "1,200")


def test_guards_are_shown_where_they_had_something_to_say(tmp_path: Path) -> None:
    said = {"name": "initial_loss", "status": "warning", "message": "It is 10.9 nats."}
    quiet = {"name": "causality", "status": "passed", "message": "Fine."}
    write_run(tmp_path / "a", guards=[said, quiet])

    groups = groups_of(tmp_path)

    assert [row[:5] for row in guard_table(groups).rows] == [["A", "0", "initial_loss", "warning", "It is 10.9 nats."]]
    assert runs_table(groups, "val/loss").rows[0][5] == "1 warning, 1 passed"


def test_best_group_of_an_accuracy_is_the_highest(tmp_path: Path) -> None:
    for name, accuracy in (("low", 0.1), ("high", 0.9)):
        folder = write_run(tmp_path / name, config={"model": {"kind": name}}, metrics={}, best_metrics={})
        (folder / "run.json").write_text(
            (folder / "run.json").read_text().replace('"val/loss": 2.0', f'"val/accuracy": {accuracy}', 1)
        )

    assert [group.label for group in groups_of(tmp_path, "val/accuracy")] == ["model=high", "model=low"]


def test_pareto_front_keeps_what_nothing_beats() -> None:
    placed = [(2.0, 3.0), (1.0, 5.0), (2.0, 4.0), (3.0, 3.5), (4.0, 1.0)]

    assert pareto_front(placed) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto_front(placed, higher_is_better=True) == [(1.0, 5.0)]


def test_report_needs_nothing_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_comparison(tmp_path))]) == 0

    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^" )>]+)', page)
    assert len(sources) == 3
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in page
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    for picture in ("report_curves.png", "report_pareto.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_csv_holds_a_row_of_numbers_for_every_run(tmp_path: Path) -> None:
    main([str(write_comparison(tmp_path))])

    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["model.kind"], row["seed"], row["val/loss"], row["parameters"]) for row in rows[:2]] == [
        ("infini", "0", "2.0", "1200"),
        ("infini", "1", "2.5", "1200"),
    ]
    assert len(rows) == 6


def test_names_from_the_configuration_cannot_become_markup(tmp_path: Path) -> None:
    for name in ("<script>alert(1)</script>", "plain"):
        write_run(tmp_path / f"run_{len(name)}", config={"model": {"kind": name}})

    main([str(tmp_path)])

    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_unreadable_folders_are_listed_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path)
    (tmp_path / "infini_0/run.json").unlink()
    (tmp_path / "infini_1/metrics.jsonl").write_text("{\n{}\n")
    (tmp_path / "infini_2/run.json").write_text('{"seed": 2, "status": "finished", "guards": {"causality": "passed"}}')

    assert main([str(tmp_path), str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 0

    told, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "3 runs of 1 configuration (3 finished); 4 folders not readable" in told
    for text in (
        "run.json: is missing",
        "metrics.jsonl:1: is damaged",
        "was written by another version",
        "is no folder",
    ):
        assert text in told
        assert text in page


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"metrics": [["val/loss", 2.0]]}, "metrics missing or of another form"),
        ({"state_bytes": "64 B", "overrides": "seed=0"}, "overrides, state_bytes missing or of another form"),
        ({"guards": [{"name": "causality", "passed": True}]}, "guards missing or of another form"),
    ],
)
def test_a_run_of_another_version_is_listed_with_the_reason(tmp_path: Path, facts: dict[str, Any], told: str) -> None:
    write_run(tmp_path / "ours")
    write_run(tmp_path / "theirs", **facts, status="stopped")

    runs, (unreadable,) = collect([tmp_path])

    assert [run.run.folder.name for run in runs] == ["ours"]
    assert f"{tmp_path / 'theirs/run.json'}: was written by another version ({told})" in unreadable.reason


def test_hidden_folders_and_copies_are_left_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run/.hydra").mkdir()
    (tmp_path / "other/.hydra").mkdir(parents=True)
    (tmp_path / "other/.hydra/config.yaml").write_text("a: 1")

    runs, unreadable = collect([tmp_path, tmp_path / "run"])

    assert len(runs) == 1
    assert unreadable == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere"], r"nowhere holds no run that can be read. Allowed: folders that train.py wrote"),
        (["{folder}/nowhere", "{folder}/neither"], r"nowhere, .*neither hold no run that can be read"),
        ([""], r"argument folders: an empty name names no folder, \. is the current one\. Allowed: "),
        (["{folder}", "--output", ""], r"argument --output: an empty name names no folder"),
        (["{folder}", "--metric", "val/los"], r"--metric=val/los: was logged by no run. .*Closest: val/loss"),
        (["{folder}", "--baseline", "mamba"], r"--baseline=mamba: names 0 configurations. .*A  model=infini"),
        (["{folder}", "--baseline", "model"], r"--baseline=model: names 2 configurations"),
        (["{folder}", "--output", "{folder}/infini_0/run.json"], r"report: .*run.json.* Choose another with --output"),
    ],
)
def test_what_cannot_be_reported_is_refused_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_comparison(tmp_path)

    assert exit_code(main, [argument.format(folder=tmp_path) for argument in arguments]) == 2

    captured = capsys.readouterr()
    assert captured.err.startswith("newllm: nothing was started, 1 problem found:\n  - ")
    assert re.search(message, captured.err, re.DOTALL)
    assert captured.out == ""


def test_baseline_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_comparison(tmp_path)), "--baseline", "pythia"])

    assert "minus that of B (model=pythia)" in capsys.readouterr().out


def test_hundreds_of_runs_take_seconds_and_no_torch(tmp_path: Path) -> None:
    losses = tuple(2.0 + 1.0 / (place + 1) for place in range(200))
    for number in range(300):
        config = {"model": {"kind": f"m{number // 3}"}, **{f"key_{place}": place for place in range(100)}}
        write_run(tmp_path / f"run_{number}", seed=number % 3, losses=losses, config=config)
    code = "import sys; from newllm.report.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)

    assert answer.stdout.splitlines()[-1] == "False"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what the clock shows depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_seeds_trained_on_other_content_of_a_file_are_no_group(tmp_path: Path) -> None:
    own = {"data": {"kind": "jsonl", "path": "text.jsonl"}}
    for seed, fingerprint in enumerate(["a" * 64, "a" * 64, "b" * 64]):
        write_run(tmp_path / f"run_{seed}", seed=seed, config=own, data_fingerprint=fingerprint)
    drawn = {"data": {"kind": "delay_copy"}}
    for seed in range(2):
        write_run(tmp_path / f"drawn_{seed}", seed=seed, config=drawn, data_fingerprint=str(seed) * 64)

    found = {group.label: len(group.runs) for group in groups_of(tmp_path)}

    assert sorted(found.values()) == [1, 2, 2]
    assert any("data_fingerprint=aaaaaaaaaaaa" in label for label in found)


def test_seeds_of_other_precisions_are_no_group(tmp_path: Path) -> None:
    for seed, precision in enumerate(["32-true", "bf16-mixed"]):
        write_run(tmp_path / f"run_{seed}", seed=seed, config={"runtime": {"devices": 1, "precision": precision}})

    assert sorted(group.label for group in groups_of(tmp_path)) == [
        "runtime.precision=32-true",
        "runtime.precision=bf16-mixed",
    ]
