"""What a terminal shows while jobs run."""

import io
import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest

from newllm.jobs.live import counted, live_rows, progress
from newllm.jobs.record import JobRecord
from newllm.jobs.sweep import Narrator


def job(folder: Path, number: int, status: str, **facts: object) -> JobRecord:
    return JobRecord(number=number, overrides=[f"seed={number}"], folder=str(folder), status=status, **facts)


def log(folder: Path, *lines: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps({'tokens': 1, **line})}\n" for line in lines))


def test_progress_is_the_last_step_and_the_last_validation_loss(tmp_path: Path) -> None:
    log(
        tmp_path / "run", {"step": 10, "val/loss": 3.5}, {"step": 20, "val/loss": 3.25}, {"step": 30, "train/loss": 3.0}
    )
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train')  # being written

    assert progress(tmp_path / "run") == (30, 3.25)
    assert progress(tmp_path / "none") == (None, None)


def test_a_long_log_is_not_read_from_its_beginning(tmp_path: Path) -> None:
    steps = [{"step": step, "train/loss": 2.5} for step in range(5000)]
    log(tmp_path / "run", {"step": 0, "val/loss": 9.0}, *steps)

    assert progress(tmp_path / "run") == (4999, None)


def test_only_running_jobs_have_a_row(tmp_path: Path) -> None:
    log(tmp_path / "abc", {"step": 1200, "val/loss": 2.5})
    records = [
        job(tmp_path / "abc", 0, "running", started=100.0, device="3"),
        job(tmp_path / "def", 1, "done", started=100.0),
        job(tmp_path / "ghi", 2, "running", started=104.4),
    ]

    assert live_rows(records, now=112.4) == [
        ("0", "abc", "1,200", "2.500", "12", "3", "seed=0"),
        ("2", "ghi", "-", "-", "8", "-", "seed=2"),
    ]
    assert counted(records) == "2 running, 1 done"


def test_a_terminal_shows_the_table_and_a_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path / "abc", {"step": 1200, "val/loss": 2.5})
    job(tmp_path / "abc", 0, "running", started=time.time()).write(tmp_path / "sweep")
    screen, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")

    with open(terminal, "w", closefd=False) as shown:
        monkeypatch.setattr(sys, "stderr", shown)
        with Narrator(tmp_path / "sweep"):
            time.sleep(1.2)
        shown.flush()
    told = os.read(screen, 1 << 16).decode()
    os.close(terminal)
    os.close(screen)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Narrator(tmp_path / "sweep"):
        time.sleep(1.2)

    assert "job 0 (abc) starts: seed=0" in told
    assert "val/loss" in told
    assert "1,200" in told
    assert "1 running" in told
    assert "val/loss" not in sys.stderr.getvalue()
    assert "job 0 (abc) starts: seed=0" in sys.stderr.getvalue()
