"""Keeps in run.json how long a session has lasted, for the case that it is killed."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from newllm.run_record import RunRecord


class Clock(Callback):
    """Writes a session's duration with every checkpoint: what a killed session leaves is continued from there.

    Args:
        record: of the run.
        started: when the session began, on the monotonic clock.
    """

    def __init__(self, record: RunRecord, started: float) -> None:
        self.record, self.started = record, started

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.record.has_lasted(time.monotonic() - self.started)
