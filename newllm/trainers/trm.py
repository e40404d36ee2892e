"""Training of recursive models by deep supervision: a loss after every supervision step, gradient through its last cycle only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from newllm.config.schema import TrainerConfig
from newllm.losses.deep_supervision import DeepSupervisionLoss
from newllm.models.trm import TrmLM
from newllm.trainers.base import Batch, TrainingModule

# The unrolled gradient keeps every cycle's activations: a few rows tell as much as a batch.
PROBE_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class TrmTrainerConfig(TrainerConfig):
    """Deep supervision."""

    shares_batches: ClassVar[bool] = True
    allows_feedback: ClassVar[bool] = False
    only_model: ClassVar[str | None] = "trm"
    gives: ClassVar[str] = "answers"


class TrmModule(TrainingModule):
    """Each block starts from an empty state; one optimizer step for all supervision steps.

    Validation scores the answer of the last supervision step, under averaged weights where `trainer.ema_decay` keeps an average.
    """

    model: TrmLM
    loss: DeepSupervisionLoss

    def states(self, batch: Batch) -> Tensor:
        """Return the answers after every supervision step [B, T, N, D]."""
        return self._answers(batch, unrolled=False)

    def probe(self, batch: Batch) -> dict[str, float]:
        """Return also the loss by supervision step, how halting is judged, and what leaving out cycles does to the gradient."""
        with torch.no_grad():
            found = self.loss.statistics(self.model, self.states(batch), batch["labels"])
        few = {name: tensor[:PROBE_ROWS] for name, tensor in batch.items()}
        return super().probe(batch) | found | {"trm/gradient_cosine": self.gradient_cosine(few)}

    def gradient_cosine(self, batch: Batch) -> float:
        """Return the cosine between the gradient through the last cycles and that through everything, unitless.

        The parameters' own gradients are left as they are.
        """
        truncated, whole = (self._gradient(batch, unrolled=unrolled) for unrolled in (False, True))
        return nn.functional.cosine_similarity(truncated, whole, dim=0).item()

    def _answers(self, batch: Batch, *, unrolled: bool) -> Tensor:
        input_ids = batch["input_ids"]
        return self.model.refine(input_ids, self.model.initial_state(input_ids.shape[0]), unrolled=unrolled).levels

    def _gradient(self, batch: Batch, *, unrolled: bool) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            loss = self.loss(self.model, self._answers(batch, unrolled=unrolled), batch["labels"])
            return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
