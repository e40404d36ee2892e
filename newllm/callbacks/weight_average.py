"""A moving average of the weights, which validation scores and checkpoints hold, kept without waiting for the device."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Lightning's average, updated after every optimizer step: w' <- decay w' + (1 - decay) w, from the first step's weights on.

    torch's own update reads from the device whether it is the first one, so each step would wait for the one before.

    Args:
        decay: share of the average that an update keeps, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self.decay = decay

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._latest_update_step:
            return
        average = self._average_model
        assert average is not None, "made before training begins"
        is_first = self._latest_update_step == 0
        averages = [*average.module.parameters(), *average.module.buffers()]
        current = [*pl_module.parameters(), *pl_module.buffers()]
        pairs = [pair for pair in zip(averages, current, strict=True) if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in pairs], [new for _, new in pairs], 1.0 if is_first else 1 - self.decay)
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step
