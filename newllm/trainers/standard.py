"""Standard training: one parallel pass, for models without feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from newllm.config.schema import TrainerConfig
from newllm.trainers.base import Batch, TrainingModule


@dataclass(frozen=True, kw_only=True)
class StandardConfig(TrainerConfig):
    """Back-propagation through one parallel pass, exact for models without feedback."""

    shares_batches: ClassVar[bool] = True
    allows_feedback: ClassVar[bool] = False


class StandardModule(TrainingModule):
    """Each block starts from an empty state."""

    def states(self, batch: Batch) -> Tensor:
        input_ids = batch["input_ids"]
        return self.model.encode(input_ids, self.model.initial_state(input_ids.shape[0])).hidden
