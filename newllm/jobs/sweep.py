"""A sweep from the outside: tells what becomes of its jobs as it happens, and ends with a table and an exit code."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from newllm.config.overrides import quoted
from newllm.jobs.job import SWEEP
from newllm.jobs.live import LiveTable, counted
from newllm.jobs.record import JobRecord, read_records
from newllm.report.tables import Table, as_text, number

LOOK_EVERY_SECONDS = 0.5


class Narrator:
    """Prints a line on stderr whenever a job begins, ends or fails; launchers say it late, or not at all.

    On a terminal a table of the running jobs stands below the lines.

    Args:
        sweep: folder with the records of the jobs.
    """

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._table = LiveTable(sys.stderr) if sys.stderr.isatty() else None
        self._told: dict[int, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        if self._table is not None:
            self._table.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()
        if self._table is not None:
            self._table.stop()

    def _follow(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        records = list(read_records(self.sweep))
        for record in records:
            if self._told.get(record.number) != record.status:
                self._told[record.number] = record.status
                print(told(record), file=sys.stderr, flush=True)
        if self._table is not None:
            self._table.show(records)


def told(record: JobRecord) -> str:
    """Return what a user wants to know of a job at once."""
    job = f"job {record.number} ({record.name})"
    log = f"{record.folder}/log.txt"
    overrides = " ".join(record.overrides) or "without overrides"
    if record.has_failed:
        return f"{job} {record.status.upper()}: {record.reason}\n  overrides: {overrides}\n  log: {log}"
    if record.status == "running":
        return f"{job} starts: {overrides}\n  log: {log}"
    loss = "" if record.val_loss is None else f", val/loss {number(record.val_loss)}"
    reason = f" ({record.reason})" if record.reason else ""
    return f"{job} {record.status}{reason}{loss}, {record.seconds or 0:.0f} s"


def table(records: Sequence[JobRecord]) -> str:
    """Return one row per job; of its overrides those that not all jobs have."""
    shared = set.intersection(*(set(record.overrides) for record in records))
    rows = [
        (
            str(record.number),
            record.name,
            record.status,
            number(record.val_loss),
            f"{record.seconds or 0:.0f}",
            " ".join(text for text in record.overrides if text not in shared),
        )
        for record in records
    ]
    columns = ("job", "folder", "status", "val/loss", "seconds", "overrides")
    width = shutil.get_terminal_size((120, 24)).columns
    return as_text(Table("jobs", columns, rows, texts=frozenset((1, 2, 5))), width=width)


def run_sweep(run: Callable[[], object], output_dir: Path) -> int:
    """Let Hydra run the sweep of sys.argv, tell its story, and return the exit code: 1 if any job failed.

    Args:
        run: Hydra's entry point.
        output_dir: where the records of the sweep go, in sweeps/<date>_<time>/.
    """
    sweep = (output_dir / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}").resolve()
    # Through Hydra, because it alone reaches the workers of every launcher.
    sys.argv.append(f"+hydra.job.env_set.{SWEEP}={quoted(str(sweep))}")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what launchers wait for
    code: object = 0
    with Narrator(sweep):
        try:
            run()
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:
            code = 130
    records = list(read_records(sweep))
    if records:
        _sum_up(records)
    if code in (None, 0):
        return int(any(record.has_failed for record in records))
    return code if isinstance(code, int) else 1


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _sum_up(records: Sequence[JobRecord]) -> None:
    is_open = {record.status for record in records} - {"done", "skipped"}
    advice = " The same command again runs those that are not done." if is_open else ""
    print(f"\n{table(records)}\n\n{len(records)} jobs: {counted(records)}.{advice}")
    folders = dict.fromkeys(str(Path(record.folder).parent) for record in records)
    print(f"sweep: {' '.join(folders)}", flush=True)
