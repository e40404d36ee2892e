"""A sweep finishes: what fails is told and tried again, what was interrupted goes on, what is done is left alone."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from newllm.config.command_line import Job
from newllm.config.compose import compose
from newllm.config.typed import plain
from newllm.jobs.job import _judged, _outcome, run_job
from newllm.jobs.record import JobRecord, read_records
from newllm.jobs.sweep import Narrator, run_sweep, table, told

ROOT = Path(__file__).parents[2]
TINY = [
    *("model=pythia", "size.dim=8", "size.num_layers=1", "size.num_heads=2", "size.mlp_dim=16", "data=delay_copy"),
    *("debug=fast", "trainer.max_steps=6", "callbacks=quiet", "logger=none", "evaluation=[]", "name=tiny"),
    *("guards.max_nonfinite_steps=0", "runtime.num_threads=1"),
]
JOBS = ["seed=1", "guards.plant_nan_at_step=null,5"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *TINY, *arguments]


def train(folder: Path, *arguments: str) -> CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)


def statuses(result: CompletedProcess[str]) -> dict[str, str]:
    """Status in the table by the planted step."""
    rows = re.findall(r"^ +\d+  [0-9a-f]{8}  (\w+) .*plant_nan_at_step=(\w+)$", result.stdout, flags=re.MULTILINE)
    return {step: status for status, step in rows}


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_sweep_goes_on_where_it_was_left(tmp_path: Path) -> None:
    straight = train(tmp_path, "seed=1")
    stopped = train(tmp_path, "-m", *JOBS, "stop_at_step=3")
    failing = train(tmp_path, "-m", *JOBS)
    again = train(tmp_path, "-m", *JOBS)

    assert straight.returncode == stopped.returncode == 0, straight.stderr + stopped.stderr
    assert statuses(stopped) == {"null": "stopped", "5": "stopped"}
    assert failing.returncode == again.returncode == 1
    assert statuses(failing) == {"null": "done", "5": "failed"}
    assert statuses(again) == {"null": "skipped", "5": "failed"}
    assert "2 jobs: 1 done, 1 failed. The same command again runs those that are not done." in failing.stdout
    log = re.search(r"FAILED: GuardFailure: .*\n  overrides: .*plant_nan_at_step=5\n  log: (.*)\n", failing.stderr)
    assert log is not None, failing.stderr
    said = (tmp_path / log[1]).read_text()
    assert "newllm: a guard failed, the run gives no number:\n  - guards." in said
    assert "Traceback" not in said + failing.stderr

    done = next(path.parent for path in (tmp_path / "outputs" / "tiny").glob("*/DONE") if "_" not in path.parent.name)
    alone = tmp_path / straight.stdout.splitlines()[-1].removeprefix("run: ")
    weights, expected = checkpoint(done)["state_dict"], checkpoint(alone)["state_dict"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert checkpoint(done)["global_step"] == 6


@pytest.mark.slow
def test_a_terminated_sweep_saves_its_job_and_tells_so(tmp_path: Path) -> None:
    overrides = ("-m", "seed=1,2", "trainer.max_steps=100000", "trainer.validate_every_steps=100000")
    running = subprocess.Popen(command(*overrides), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("outputs/tiny/*/checkpoints/last.ckpt")):
        assert running.poll() is None, "the sweep ended before it was told to"
        time.sleep(0.2)

    running.send_signal(signal.SIGTERM)
    shown, _ = running.communicate(timeout=120)

    assert running.returncode == 143
    assert "1 jobs: 1 stopped." in shown
    assert "stopped by SIGTERM; saved" in next(tmp_path.glob("outputs/tiny/*/log.txt")).read_text()


def test_a_job_done_with_other_settings_is_refused(tmp_path: Path) -> None:
    first = train(tmp_path, "-m", "seed=1")
    (config,) = tmp_path.glob("outputs/tiny/*/config.yaml")
    config.write_text(config.read_text().replace("max_steps: 6", "max_steps: 7"))

    result = train(tmp_path, "-m", "seed=1")

    assert first.returncode == 0, first.stderr
    assert result.returncode == 1
    assert "REFUSED: done with other settings; remove the folder. trainer.max_steps=6: the run in" in result.stderr


def test_a_job_of_another_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = compose([*TINY, "seed=1"])
    (tmp_path / "DONE").touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain(config), "memory": 3}))

    outcome = _outcome(Job(config, tmp_path, [*TINY, "seed=1"]), ROOT / "train.py", record(0, "running"))

    assert outcome.status == "refused"
    assert "was not written by this version of newllm: memory=3: is not a key here." in outcome.reason


@pytest.mark.parametrize("error", [OSError("no room"), KeyError("status"), RuntimeError("can't start new thread")])
def test_a_job_that_cannot_be_started_fails_alone(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    hydra = SimpleNamespace(job=SimpleNamespace(num=3))
    monkeypatch.setattr("newllm.jobs.job.HydraConfig", SimpleNamespace(get=lambda: hydra))
    monkeypatch.setattr("newllm.jobs.job._outcome", fail)
    monkeypatch.setenv("NEWLLM_SWEEP", str(tmp_path))

    loss = run_job(Job(compose(TINY), tmp_path / "job", [*TINY]), ROOT / "train.py")

    assert loss is None
    (left,) = read_records(tmp_path)
    assert (left.number, left.status, left.reason) == (3, "failed", f"{type(error).__name__}: {error}")


def record(number: int, status: str, **facts: Any) -> JobRecord:
    overrides = ["model=infini", f"seed={number}"]
    return JobRecord(number=number, overrides=overrides, folder=f"outputs/s/{number:08x}", status=status, **facts)


def test_each_change_of_a_job_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrator = Narrator(tmp_path)
    record(0, "running").write(tmp_path)
    narrator._look()
    narrator._look()
    record(0, "killed", reason="by SIGKILL (out of memory?)").write(tmp_path)
    record(1, "done", val_loss=2.5, seconds=3.2).write(tmp_path)
    narrator._look()

    assert capsys.readouterr().err.splitlines() == [
        "job 0 (00000000) starts: model=infini seed=0",
        "  log: outputs/s/00000000/log.txt",
        "job 0 (00000000) KILLED: by SIGKILL (out of memory?)",
        "  overrides: model=infini seed=0",
        "  log: outputs/s/00000000/log.txt",
        "job 1 (00000001) done, val/loss 2.500, 3 s",
    ]


def test_the_table_shows_what_differs() -> None:
    lines = table([record(0, "done", val_loss=2.5, seconds=61.0), record(1, "busy", reason="elsewhere")]).splitlines()

    assert [line.split() for line in lines[2:]] == [
        ["0", "00000000", "done", "2.500", "61", "seed=0"],
        ["1", "00000001", "busy", "-", "0", "seed=1"],
    ]
    alone = replace(record(1, "running"), overrides=[])
    assert told(alone) == "job 1 (00000001) starts: without overrides\n  log: outputs/s/00000001/log.txt"
    assert told(record(1, "busy", reason="elsewhere")) == "job 1 (00000001) busy (elsewhere), 0 s"


@pytest.mark.parametrize(
    ("jobs", "ended", "code"),
    [
        (["done", "skipped", "stopped", "busy", "checked"], None, 0),
        (["done", "refused"], None, 1),
        (["killed"], 0, 1),
        (["done"], 2, 2),
        ([], "text", 1),
        (["stopped"], KeyboardInterrupt, 130),
    ],
)
def test_the_exit_code_tells_of_failed_jobs(
    jobs: list[str], ended: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def run() -> None:
        given = sys.argv[-1]
        assert given.startswith("+hydra.job.env_set.NEWLLM_SWEEP='")
        sweep = Path(given.partition("'")[2].rstrip("'"))
        for number, status in enumerate(jobs):
            record(number, status).write(sweep)
        if ended is not None:
            raise ended if isinstance(ended, type) else SystemExit(ended)

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_sweep(run, tmp_path) == code
    finally:
        signal.signal(signal.SIGTERM, before)

    (sweep,) = (tmp_path / "sweeps").glob("*") if jobs else [tmp_path / "none"]
    assert len(list(read_records(sweep))) == len(jobs)
    assert os.environ.get("NEWLLM_SWEEP") is None


def test_a_done_job_whose_text_was_written_since_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, held_out, folder = tmp_path / "text.txt", tmp_path / "held_out.txt", tmp_path / "job"
    given = ["model=pythia", "data=jsonl", "data.path=text.txt", "data.validation=held_out.txt"]
    for path in (text, held_out):
        path.write_text("text")
        os.utime(path, (1000, 1000))
    config = compose(given)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    (folder / "run.json").write_text('{"metrics": {"val/loss": 2.5}}')
    (folder / "DONE").touch()

    def outcome() -> JobRecord:
        return _outcome(Job(config, folder, given), ROOT / "train.py", record(0, "running"))

    before = outcome()
    os.utime(held_out)
    os.utime(folder / "DONE", (2000, 2000))
    after = outcome()

    assert (before.status, before.reason, before.val_loss) == ("skipped", "", 2.5)
    assert (after.status, after.reason) == (
        "skipped",
        "data.validation changed since: remove the folder to train on it",
    )


def test_a_job_that_hydra_ends_is_told_by_its_error(tmp_path: Path) -> None:
    lines = ["ValueError: it broke", "", "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."]

    assert _judged(record(0, "running"), 1, tmp_path, lines[:1] + lines[2:]).reason == "ValueError: it broke"
