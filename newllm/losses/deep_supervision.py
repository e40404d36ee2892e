"""Deep supervision: every supervision step of a recursive model predicts the next token, and judges whether more steps would help.

N: supervision steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LossConfig
from newllm.losses.next_token import NO_TARGET, mean_over_targets, token_nats
from newllm.models.trm import TrmLM


@dataclass(frozen=True, kw_only=True)
class DeepSupervisionConfig(LossConfig):
    """Mean over supervision steps of nats per target token, and a price for misjudged halting.

    Attributes:
        act_weight: weight of the halting judgement's binary cross entropy, nats per nat.
        halting_margin: nats by which a later step must lower a token's cross entropy to count as help.
    """

    reads: ClassVar[str] = "answers"

    act_weight: Annotated[float, Range(minimum=0)]
    halting_margin: Annotated[float, Range(minimum=0)]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the loss and the model."""
        if config.model.kind == "trm":
            return []
        return [
            f"loss=deep_supervision: scores every supervision step, a model of kind {config.model.kind} has none. "
            "Allowed with it: model=trm. Choose it or another loss."
        ]


def halting_targets(nats_BTN: Tensor, margin: float) -> Tensor:
    """Return 1 [B, T, N] where no later supervision step lowers the token's cross entropy by more than the margin, else 0.

    The published target, 1 where a whole sequence is right, never comes about in language and drives the judgement to "never".

    Args:
        nats_BTN: cross entropy of every token after every supervision step.
        margin: nats.
    """
    best_from = nats_BTN.flip(-1).cummin(dim=-1).values.flip(-1)
    # Nothing is later than the last step.
    best_later = nn.functional.pad(best_from[..., 1:], (0, 1), value=float("inf"))
    return (best_later >= nats_BTN - margin).to(nats_BTN.dtype)


class DeepSupervisionLoss(nn.Module):
    """Cross entropy and `act_weight` times the halting judgement's, mean over targets and supervision steps.

    Args:
        config: weight and margin.
    """

    def __init__(self, config: DeepSupervisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, model: TrmLM, levels_BTND: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar with gradient.

        Args:
            model: gives logits and halting judgements of the answers.
            levels_BTND: answers after every supervision step.
            targets: the token after each position [B, T], as the batch holds them: nothing is shifted here.
        """
        nats = step_nats(model, levels_BTND, targets)
        helps_no_more = halting_targets(nats.detach(), self.config.halting_margin)
        judged = model.halting_logits(levels_BTND).to(nats.dtype)
        judgement = nn.functional.binary_cross_entropy_with_logits(judged, helps_no_more, reduction="none")
        return mean_over_targets(nats + self.config.act_weight * judgement, targets)

    @torch.no_grad()
    def statistics(self, model: TrmLM, levels_BTND: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the loss after every supervision step (nats per token), and how often halting is right and judged right."""
        is_target = targets != NO_TARGET
        nats = step_nats(model, levels_BTND, targets)
        helps_no_more = halting_targets(nats, self.config.halting_margin)[is_target]
        judged = (model.halting_logits(levels_BTND) > 0)[is_target]
        steps = {f"trm/loss_step_{n}": loss for n, loss in enumerate(nats[is_target].mean(dim=0).tolist(), start=1)}
        return steps | {
            "trm/halting_target_mean": helps_no_more.mean().item(),
            "trm/halting_accuracy": (judged == helps_no_more.bool()).double().mean().item(),
        }


def step_nats(model: TrmLM, levels_BTND: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy after every supervision step [B, T, N], nats."""
    return token_nats(model, levels_BTND, targets.unsqueeze(-1).expand(levels_BTND.shape[:3]))


def build(config: DeepSupervisionConfig) -> DeepSupervisionLoss:
    """Return the loss that a configuration describes."""
    return DeepSupervisionLoss(config)
