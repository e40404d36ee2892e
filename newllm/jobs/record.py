"""What became of the jobs of one sweep: a small file for each, written by the job, read by whoever waits for them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from newllm.whole_file import write_whole

FAILURES = ("failed", "killed", "refused")
"""Statuses that make the sweep end with exit code 1."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Where a job stands.

    Attributes:
        number: place in the sweep, from 0.
        overrides: what the user typed for it.
        folder: its run folder, named by the hash of its overrides.
        status: running, done, skipped (was done before), stopped (goes on with the next sweep), busy (another sweep runs
            it), checked (cost estimate), or one of FAILURES.
        val_loss: last validation loss, nats per token.
        seconds: duration of this session.
        reason: why it failed or stopped, in words.
        started: when this session began, seconds since 1970.
        device: the devices its launcher gave it (CUDA_VISIBLE_DEVICES); None where it gave none.
    """

    number: int
    overrides: list[str]
    folder: str
    status: str
    val_loss: float | None = None
    seconds: float | None = None
    reason: str = ""
    started: float | None = None
    device: str | None = None

    @property
    def name(self) -> str:
        """Name of the job's folder."""
        return Path(self.folder).name

    @property
    def has_failed(self) -> bool:
        """Whether it counts as a failure of the sweep."""
        return self.status in FAILURES

    def write(self, sweep: Path) -> None:
        """Leave the record in the sweep's folder in place of the job's earlier one."""
        sweep.mkdir(parents=True, exist_ok=True)
        write_whole(sweep / f"{self.number:05d}.json", json.dumps(asdict(self), indent=2) + "\n")


def read_records(sweep: Path) -> Iterator[JobRecord]:
    """Yield the records in a sweep's folder in the order of the jobs."""
    for path in sorted(sweep.glob("*.json")):
        yield JobRecord(**json.loads(path.read_text(encoding="utf-8")))
