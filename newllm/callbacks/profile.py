"""Where the time of a step goes: a trace, and the dearest operations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from newllm.callbacks.loop import has_stepped
from newllm.whole_file import write_whole

log = logging.getLogger(__name__)

# Optimizer steps of this session before the first that is looked at (allocators, caches and compilers settle), and how many are.
FIRST_STEPS, STEPS = 3, 3
ROWS = 10


class ProfileSteps(Callback):
    """Looks at a few early optimizer steps and writes profile/trace.json.gz (for Perfetto) and profile/operations.txt.

    Put it first among the callbacks: what the others do between steps is then part of the picture. The steps looked at are slower
    than others, and so are the speeds that this session reports.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "profile"
        self._profile: Any = None
        self._made = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and self._made == FIRST_STEPS and self._profile is None:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if has_stepped(trainer):
            self._made += 1
        if self._made == FIRST_STEPS + STEPS and self._profile is not None:
            self._finish(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profile is not None:
            self._finish(pl_module.device)
        if trainer.is_global_zero and self._made <= FIRST_STEPS:
            log.warning(
                "profile: the session made %d steps, the first that is looked at is %d", self._made, FIRST_STEPS + 1
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._profile is not None:
            self._finish(pl_module.device)

    def _finish(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        profile, self._profile = self._profile, None
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=ROWS)
        write_whole(self.folder / "operations.txt", table + "\n")
        log.info("profile: %d steps in %s\n%s", self._made - FIRST_STEPS, self.folder, table)
