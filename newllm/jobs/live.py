"""What a terminal shows while a sweep runs: the running jobs, how far each is, and how many have ended how."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from newllm.jobs.record import JobRecord
from newllm.report.tables import NONE, number

TAIL_BYTES = 1 << 16  # enough for some log steps


def progress(folder: Path) -> tuple[int | None, float | None]:
    """Return the last logged step of a run and, nats per token, the last validation loss near its end."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None, None
    step, loss = None, None
    for line in reversed(lines):
        try:
            values = json.loads(line)
            step = values["step"] if step is None else step
            loss = values.get("val/loss")
        except (ValueError, TypeError, KeyError, AttributeError):  # cut by the tail, or being written
            continue
        if loss is not None:
            break
    return step, loss


def live_rows(records: Sequence[JobRecord], now: float) -> list[tuple[str, ...]]:
    """Return job, folder, step, val/loss, seconds, device and overrides of each running job.

    Args:
        records: jobs that have begun.
        now: seconds since 1970.
    """
    rows: list[tuple[str, ...]] = []
    for record in records:
        if record.status != "running":
            continue
        step, loss = progress(Path(record.folder))
        seconds = 0.0 if record.started is None else now - record.started
        told = (NONE if step is None else number(step), number(loss), f"{seconds:.0f}", record.device or NONE)
        rows.append((str(record.number), record.name, *told, " ".join(record.overrides)))
    return rows


def counted(records: Sequence[JobRecord]) -> str:
    """Return how many jobs there are of each status, in the order in which statuses came up."""
    statuses = [record.status for record in records]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))


class LiveTable:
    """The table at the bottom of a terminal; lines printed meanwhile go above it.

    Args:
        terminal: stderr.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._live = Live(console=Console(file=terminal), auto_refresh=False, transient=True, redirect_stdout=False)

    def start(self) -> None:
        """Take the bottom of the terminal."""
        self._live.start()

    def show(self, records: Sequence[JobRecord]) -> None:
        """Show the jobs as they stand now."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("job", "folder", "step", "val/loss", "seconds", "device", "overrides"):
            is_text = column in ("folder", "device", "overrides")
            table.add_column(column, justify="left" if is_text else "right", no_wrap=True, overflow="ellipsis")
        for row in live_rows(records, time.time()):
            table.add_row(*map(Text, row))
        self._live.update(Group(table, Text(counted(records))), refresh=True)

    def stop(self) -> None:
        """Give the terminal back; the table disappears."""
        self._live.stop()
