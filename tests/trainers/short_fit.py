"""A few optimizer steps with Lightning, nothing written."""

from typing import Any

import lightning
from torch import Tensor
from torch.utils.data import DataLoader

from newllm.trainers.base import TrainingModule

SHORT = ["trainer.max_steps=3", "trainer.validate_every_steps=3", "schedule.warmup_steps=1"]
"""Overrides of a configuration that fits."""


def fit(
    module: TrainingModule,
    train: list[dict[str, Tensor]],
    validation: list[dict[str, Tensor]] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return all logged metrics after one optimizer step on each batch and, at the end, a validation."""
    trainer = lightning.Trainer(
        max_steps=len(train),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=len(train),
        **options,
    )
    loaders = [None if part is None else DataLoader(part, batch_size=None) for part in (train, validation)]
    trainer.fit(module, *loaders)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}
