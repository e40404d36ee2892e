"""The last step of a run is validated, whether or not it is a multiple of the interval."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from newllm.callbacks.loop import has_stepped


class ValidateAtEnd(Callback):
    """Makes the last optimizer step one that Lightning validates after: a run's final weights have a number."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if has_stepped(trainer) and trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
