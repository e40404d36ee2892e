"""Measures what a procedure wants to know of the batch it is about to train on: lag, memory."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Probe(Callback):
    """Logs the module's `probe(batch)` every n optimizer steps, before the step that uses the batch.

    Put it before the callback that measures speed: the time it takes is not training's.

    Args:
        every_steps: optimizer steps from one measurement to the next.
    """

    def __init__(self, *, every_steps: int) -> None:
        self.every_steps = every_steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        opens_step = batch_idx % trainer.accumulate_grad_batches == 0
        if opens_step and (trainer.global_step + 1) % self.every_steps == 0:
            pl_module.log_dict(pl_module.probe(batch), batch_size=batch["input_ids"].shape[0])  # type: ignore[operator]
