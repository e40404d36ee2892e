"""Validation without compiled code."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EagerValidation(Callback):
    """Runs validation uncompiled: the exact recurrence calls each layer with other shapes than training, position by position.

    Compiled for them too, a layer would be compiled again and again.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.compiler.set_stance("default")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        torch.compiler.set_stance("default")
