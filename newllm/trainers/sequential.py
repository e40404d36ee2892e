"""Exact sequential training: the recurrence run one position after another, the reference for speed and quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from newllm.config.fields import Range
from newllm.config.schema import TrainerConfig
from newllm.recurrence import unroll
from newllm.trainers.base import Batch, TrainingModule


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(TrainerConfig):
    """Back-propagation through time.

    Attributes:
        truncate_steps: positions after which the gradient is cut; null keeps it through the whole block.
    """

    shares_batches: ClassVar[bool] = True
    needs_feedback: ClassVar[bool] = True

    truncate_steps: Annotated[int | None, Range(minimum=1)]


class SequentialModule(TrainingModule):
    """Every step reads the layers' cached state, as generation does."""

    def states(self, batch: Batch) -> Tensor:
        options: SequentialConfig = self.config.trainer  # type: ignore[assignment]  # the schema of trainer=sequential
        input_ids = batch["input_ids"]
        state = self.model.initial_state(input_ids.shape[0])
        return unroll(self.model, input_ids, state, truncate=options.truncate_steps)[0]
