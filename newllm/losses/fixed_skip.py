"""Cross entropy of the steps that emit, where only each s-th step of a model does and the others carry over.

s: steps per token. N: steps of a text, all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from newllm.config.schema import LossConfig
from newllm.losses.next_token import NO_TARGET, NextTokenConfig, NextTokenLoss
from newllm.models.base import LanguageModel


@dataclass(frozen=True, kw_only=True)
class FixedSkipConfig(LossConfig):
    """Mean nats per target token; every token is a target once, at the step that emits it."""

    reads: ClassVar[str] = "steps"

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the loss and the model."""
        if getattr(config.model, "halting", "fixed") == "fixed":
            return []
        return [
            f"loss=fixed_skip: trains the last step only, model.halting={config.model.halting} weighs all steps. "
            "Allowed with fixed_skip: model.halting=fixed. Choose loss=halting or model.halting=fixed."
        ]


@dataclass(frozen=True)
class Steps:
    """What each step of a model has read and is to predict, as places in the text.

    Attributes:
        last_read: place of the last token that entered the model [N].
        target: place of the token the step emits [N]; `NO_TARGET` where it carries over.
    """

    last_read: Tensor
    target: Tensor


def interleaved_steps(length: int, skip_interval: int) -> Steps:
    """Return the steps over a text of `length` tokens to read: s at each token, of which the last emits.

    A carry-over step reads nothing: inputs that advanced while the target waited would soon contain it.
    """
    step = torch.arange(length * skip_interval)
    last_read = step // skip_interval
    emits = step % skip_interval == skip_interval - 1
    return Steps(last_read, torch.where(emits, last_read + 1, NO_TARGET))


def count_leaks(steps: Steps) -> int:
    """Return how many targets are among the tokens their step has read."""
    return int(((steps.target != NO_TARGET) & (steps.target <= steps.last_read)).sum())


def check_steps(steps: Steps, length: int) -> None:
    """Assert that no target is among the inputs and every token after the first is a target once."""
    targets = steps.target[steps.target != NO_TARGET]
    leaks = count_leaks(steps)
    assert leaks == 0, (
        f"{leaks} of {len(targets)} targets are among the tokens already read: the loss would score copying"
    )
    each_once = torch.equal(targets.sort().values, torch.arange(1, length + 1))
    assert each_once, f"{len(targets)} targets over {length} tokens: every token must be a target exactly once"


class FixedSkipLoss(nn.Module):
    """Mean cross entropy over the emitting steps, nats per token.

    Args:
        config: no options.
    """

    def __init__(self, config: FixedSkipConfig) -> None:
        super().__init__()
        self.next_token = NextTokenLoss(NextTokenConfig(kind="next_token"))

    def forward(self, model: LanguageModel, levels_BTsD: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar with gradient.

        Args:
            model: gives the logits of the states.
            levels_BTsD: hidden state of every step.
            targets: the token after each position [B, T], as the batch holds them: nothing is shifted here.
        """
        steps = interleaved_steps(*levels_BTsD.shape[1:3])
        check_steps(steps, length=levels_BTsD.shape[1])
        emitting = (steps.target != NO_TARGET).nonzero().squeeze(1)
        # Place p of the text stands at p - 1 of the batch's targets, which are one token ahead.
        places = steps.target[emitting] - 1
        hidden = levels_BTsD.flatten(1, 2)[:, emitting.to(levels_BTsD.device)]  # [B, T*s, D] -> [B, T, D]
        return self.next_token(model, hidden, targets[:, places.to(targets.device)])

    @torch.no_grad()
    def statistics(self, model: LanguageModel, levels_BTsD: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the shares of steps that emit and that carry over, unitless."""
        steps = interleaved_steps(*levels_BTsD.shape[1:3])
        output_ratio = (steps.target != NO_TARGET).double().mean().item()
        return {"selective/output_ratio": output_ratio, "selective/carry_over_ratio": 1 - output_ratio}


def build(config: FixedSkipConfig) -> FixedSkipLoss:
    """Return the loss that a configuration describes."""
    return FixedSkipLoss(config)
