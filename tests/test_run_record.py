import json
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from newllm.run_record import RunRecord, append_metrics, keep_metrics, last_and_best, read_metrics, read_run
from newllm.whole_file import link_whole, remove_leftovers, whole_file, write_whole

FACTS: dict[str, Any] = {
    "config": {"seed": 3, "model": {"kind": "infini", "dim": 8}},
    "seed": 3,
    "config_hash": "0badcafe",
    "overrides": ["seed=3"],
    "data_fingerprint": "f00d",
    "parameters": {"total": 12},
    "state_bytes": 64,
    "flops_per_token": 100,
    "guards": [{"name": "causality", "status": "passed", "message": "No logit reads a later token."}],
}
END: dict[str, Any] = {
    "tokens": 640,
    "tokens_per_second": 64.0,
    "metrics": {"val/loss": 2.0},
    "best_metrics": {"val/loss": 1.5},
}


def test_begin_leaves_config_and_a_running_record(tmp_path: Path) -> None:
    RunRecord(tmp_path / "run").begin(**FACTS)

    run = read_run(tmp_path / "run")

    assert run.config == FACTS["config"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == FACTS["config"]
    assert run.facts["status"] == "running"
    assert {name: run.facts[name] for name in FACTS if name != "config"} == {
        name: value for name, value in FACTS.items() if name != "config"
    }
    assert set(run.facts["git"]) == {"commit", "dirty"}
    assert "torch" in run.facts["packages"]
    assert not any(path.name.endswith(".tmp") for path in (tmp_path / "run").iterdir())


def test_finish_completes_the_record_and_marks_done(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(**FACTS)
    record.update(data_fingerprint="beef")

    record.finish(status="finished", exit_reason="max_steps reached", wall_seconds=10.0, **END)

    facts = read_run(tmp_path).facts
    assert (tmp_path / "DONE").exists()
    assert facts["status"] == "finished"
    assert facts["exit_reason"] == "max_steps reached"
    assert facts["data_fingerprint"] == "beef"
    assert facts["wall_seconds"] == 10.0
    assert facts["peak_host_bytes"] > 1 << 20
    assert {name: facts[name] for name in END} == END


def test_the_peak_of_memory_is_the_own_one_whoever_started_the_process() -> None:
    started_by = bytearray(1 << 28)
    started_by[:: mmap.PAGESIZE] = b"1" * (len(started_by) // mmap.PAGESIZE)  # held, not only asked for
    code = "from newllm.environment import peak_memory; print(peak_memory()['host'])"

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert 1 << 20 < int(told.stdout) < len(started_by)


def test_stopped_run_leaves_no_marker(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(**FACTS)

    record.finish(status="stopped", exit_reason="SIGTERM", wall_seconds=1.0, **END)

    assert read_run(tmp_path).facts["status"] == "stopped"
    assert not (tmp_path / "DONE").exists()


def test_finish_refuses_an_unknown_status(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(**FACTS)

    with pytest.raises(ValueError, match=r"status='dead': is no way to finish. Allowed: 'finished', 'stopped'"):
        record.finish(status="dead", exit_reason="", wall_seconds=1.0, **END)


def test_fail_leaves_the_traceback(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(**FACTS)

    try:
        raise RuntimeError("loss is NaN")
    except RuntimeError as error:
        record.fail(error, wall_seconds=2.0)

    assert read_run(tmp_path).facts["status"] == "failed"
    assert read_run(tmp_path).facts["exit_reason"] == "RuntimeError: loss is NaN"
    assert "test_fail_leaves_the_traceback" in (tmp_path / "FAILED").read_text()


def test_resumed_run_adds_a_session_and_keeps_the_first_start(tmp_path: Path) -> None:
    first = RunRecord(tmp_path)
    first.begin(**FACTS)
    first.finish(status="stopped", exit_reason="SIGTERM", wall_seconds=3.0, **END)
    started = read_run(tmp_path).facts["started"]

    second = RunRecord(tmp_path)
    second.begin(**{**FACTS, "config": {"seed": 4}, "overrides": ["resume=here"]})
    second.finish(status="finished", exit_reason="max_steps reached", wall_seconds=4.0, **END)

    run = read_run(tmp_path)
    assert [session["status"] for session in run.facts["sessions"]] == ["stopped", "finished"]
    assert [session["overrides"] for session in run.facts["sessions"]] == [["seed=3"], ["resume=here"]]
    assert run.facts["overrides"] == ["seed=3"]
    assert run.config == FACTS["config"]
    assert run.facts["started"] == started
    assert run.facts["wall_seconds"] == 7.0


def test_a_killed_session_counts_as_long_as_it_is_known_to_have_lasted(tmp_path: Path) -> None:
    killed = RunRecord(tmp_path)
    killed.begin(**FACTS)
    killed.has_lasted(14.0)

    second = RunRecord(tmp_path)
    second.begin(**FACTS)
    second.finish(status="finished", exit_reason="max_steps reached", wall_seconds=4.0, **END)

    facts = read_run(tmp_path).facts
    assert [session["wall_seconds"] for session in facts["sessions"]] == [14.0, 4.0]
    assert facts["wall_seconds"] == 18.0


def test_the_time_of_a_run_is_unknown_where_that_of_a_killed_session_is(tmp_path: Path) -> None:
    RunRecord(tmp_path).begin(**FACTS)

    second = RunRecord(tmp_path)
    second.begin(**FACTS)
    second.finish(status="finished", exit_reason="max_steps reached", wall_seconds=4.0, **END)

    assert read_run(tmp_path).facts["wall_seconds"] is None


def test_killed_session_is_told_apart_and_markers_go_when_a_run_goes_on(tmp_path: Path) -> None:
    RunRecord(tmp_path).begin(**FACTS)
    (tmp_path / "FAILED").write_text("an earlier error")

    RunRecord(tmp_path).begin(**FACTS)

    assert [session["status"] for session in read_run(tmp_path).facts["sessions"]] == ["killed", "running"]
    assert not (tmp_path / "FAILED").exists()


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"step": 1, "tokens": 8, "train/loss": math.inf})

    assert '"train/loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert math.isnan(read_metrics(tmp_path)[0]["train/loss"])


def test_read_metrics_leaves_out_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8}\n{"step": 2, "tok')

    assert read_metrics(tmp_path) == [{"step": 1, "tokens": 8}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"st', "Unterminated string"),
        ("[1]", "is list, not an object"),
        ('{"tokens": 8}', "has no step"),
        ('{"step": null}', "step=None is no count"),
        ('{"step": 2, "train/loss": "low"}', "train/loss='low' is no number"),
    ],
)
def test_read_metrics_names_a_damaged_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')

    with pytest.raises(ValueError, match=rf"metrics.jsonl:2: is damaged \({told}.*Delete the line"):
        read_metrics(tmp_path)


def test_keep_metrics_drops_the_steps_after_the_checkpoint_and_the_torn_line(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"step": step, "tokens": 8 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')

    keep_metrics(tmp_path, up_to_step=2)

    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "tokens": 8}\n{"step": 2, "tokens": 16}\n'


def test_last_and_best_follow_the_direction_of_each_metric() -> None:
    lines = [
        {"step": 1, "tokens": 8, "val/loss": math.nan, "val/accuracy": 0.2},
        {"step": 2, "tokens": 16, "val/loss": 2.0, "val/accuracy": 0.5},
        {"step": 3, "tokens": 24, "val/loss": 3.0, "val/accuracy": 0.4},
    ]

    last, best = last_and_best(lines)

    assert last == {"val/loss": 3.0, "val/accuracy": 0.4}
    assert best == {"val/loss": 2.0, "val/accuracy": 0.5}


@pytest.mark.parametrize(
    "name",
    [
        *("context/converged_share_validation", "context/effective_rank_validation"),
        *("lag/gradient_cosine", "trm/gradient_cosine", "trm/halting_accuracy"),
    ],
)
def test_the_best_of_what_is_good_when_high_is_the_highest(name: str) -> None:
    lines = [{"step": step, "tokens": step, name: value} for step, value in enumerate([0.1, 0.9, 0.4])]

    assert last_and_best(lines) == ({name: 0.4}, {name: 0.9})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, r"run.json: is missing"),
        ("run.json", "{", r"run.json: cannot be read"),
        ("run.json", "[]", r"run.json: holds list, not an object"),
        ("config.yaml", None, r"config.yaml: cannot be read"),
        ("config.yaml", "a: [", r"config.yaml: cannot be read"),
        ("config.yaml", "", r"config.yaml: holds no mapping"),
    ],
)
def test_read_run_refuses_a_damaged_folder(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    RunRecord(tmp_path).begin(**FACTS)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_failed_write_keeps_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    write_whole(tmp_path / "run.json", "old")

    def write_half() -> None:
        with whole_file(tmp_path / "run.json") as file:
            file.write(b"half of the n")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()

    assert (tmp_path / "run.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_linked_file_keeps_its_content_when_the_source_is_replaced(tmp_path: Path) -> None:
    write_whole(tmp_path / "last", "step 1")
    link_whole(tmp_path / "last", tmp_path / "best")
    link_whole(tmp_path / "last", tmp_path / "best")

    write_whole(tmp_path / "last", "step 2")

    assert (tmp_path / "best").read_text() == "step 1"
    assert sorted(os.listdir(tmp_path)) == ["best", "last"]


def test_link_copies_where_the_file_system_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_whole(tmp_path / "last", "step 1")

    link_whole(tmp_path / "last", tmp_path / "best")

    assert (tmp_path / "best").read_text() == "step 1"


def test_remove_leftovers_deletes_only_temporary_files(tmp_path: Path) -> None:
    (tmp_path / ".run.json.77.tmp").write_text("half")
    (tmp_path / "run.json").write_text("{}")

    remove_leftovers(tmp_path)

    assert os.listdir(tmp_path) == ["run.json"]


def test_reading_a_run_imports_no_torch(tmp_path: Path) -> None:
    RunRecord(tmp_path).begin(**FACTS)
    code = f"import sys; from newllm.run_record import read_run; read_run({str(tmp_path)!r})"
    code += "; print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout == "False\n"


def test_run_json_is_strict_json(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(**FACTS)
    record.finish(status="finished", exit_reason="", wall_seconds=1.0, **{**END, "metrics": {"val/loss": math.nan}})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)["metrics"] == {"val/loss": None}
