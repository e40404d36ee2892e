"""Training of models that take several steps per token: the loss sees the hidden states of all steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from newllm.config.schema import TrainConfig, TrainerConfig
from newllm.losses.fixed_skip import FixedSkipLoss
from newllm.losses.halting import HaltingLoss, halting_log_shares, step_nats
from newllm.losses.next_token import NO_TARGET
from newllm.models.base import LanguageModel
from newllm.models.selective import SelectiveLM
from newllm.trainers.base import Batch, TrainingModule


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(TrainerConfig):
    """Back-propagation through all steps of all tokens, one parallel pass per step."""

    shares_batches: ClassVar[bool] = True
    allows_feedback: ClassVar[bool] = False
    only_model: ClassVar[str | None] = "selective"
    gives: ClassVar[str] = "steps"


class SelectiveModule(TrainingModule):
    """Each block starts from an empty state.

    Validation scores the model as it is deployed: tokens are emitted at the last step or, with learned halting, by the threshold.
    With learned halting `val/loss_weighted` stands beside it, the mean over the steps' shares, and the mean steps of both.
    """

    model: SelectiveLM
    loss: FixedSkipLoss | HaltingLoss

    @classmethod
    def training_flops_per_token(cls, model: LanguageModel, config: TrainConfig) -> float | None:
        """With learned halting every step is scored, not only the one that emits."""
        emitting = super().training_flops_per_token(model, config)
        assert emitting is not None, "no number of passes is decided while training"
        scored = getattr(model, "skip_interval", 1) if config.loss.kind == "halting" else 1
        return emitting + 3 * (scored - 1) * model.head_flops_per_token()

    def states(self, batch: Batch) -> Tensor:
        """Return the hidden states of all steps [B, T, s, D]."""
        input_ids = batch["input_ids"]
        return self.model.encode(input_ids, self.model.initial_state(input_ids.shape[0])).levels

    @torch.no_grad()
    def probe(self, batch: Batch) -> dict[str, float]:
        return super().probe(batch) | self.loss.statistics(self.model, self.states(batch), batch["labels"])

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        super().validation_step(batch, batch_index)
        if self.model.halting_gate is not None:
            self.sums.add(batch, batch_index, {"halting": self._halting_sum(batch)})

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.model.halting_gate is not None:
            nats, steps, steps_weighted, tokens = self.sums.total()["halting"].tolist()
            self.log("val/loss_weighted", nats / tokens)
            self.log("val/mean_steps", steps / tokens)
            self.log("val/mean_steps_weighted", steps_weighted / tokens)

    def _halting_sum(self, batch: Batch) -> Tensor:
        """Over the targets: nats by the steps' shares, steps by the threshold, steps by the shares, targets."""
        levels, labels = self.states(batch), batch["labels"]
        is_target = labels != NO_TARGET
        shares = halting_log_shares(self.model.halting_logits(levels)).exp()
        nats = (shares * step_nats(self.model, levels, labels)).sum(dim=-1)
        steps = self.model.emitting_step(levels, self.model.halting_threshold) + 1
        weighted = (shares * torch.arange(1, self.model.skip_interval + 1, device=shares.device)).sum(dim=-1)
        return torch.stack([sums[is_target].double().sum() for sums in (nats, steps, weighted, is_target)]).cpu()
