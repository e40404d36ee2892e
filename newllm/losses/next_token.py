"""Cross entropy of the next token: the one loss of language modelling here; targets come shifted from data/blocks.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from newllm.config.schema import LossConfig
from newllm.models.base import LanguageModel

NO_TARGET = -100


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(LossConfig):
    """Mean nats per target token."""


def token_nats(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of every target in nats, in the targets' shape; 0 where there is none.

    Args:
        model: gives the logits of the states.
        hidden: states [..., D].
        targets: the token that each state is to predict [...].
    """
    logits = _logits(model, hidden.flatten(0, -2))
    nats = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET, reduction="none")
    return nats.view(targets.shape)


def _logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """At least fp32: the log-sum-exp over the vocabulary loses its small terms below that."""
    logits = model.logits(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class NextTokenLoss(nn.Module):
    """Mean cross entropy over all targets of a batch, nats per token; `NO_TARGET` positions do not count.

    Args:
        config: no options.
    """

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()

    def forward(self, model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar with gradient.

        Args:
            model: gives the logits of the states.
            hidden: states [B, T, D].
            targets: the token after each position [B, T], as the batch holds them: nothing is shifted here.
        """
        logits = _logits(model, hidden).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET)


def build(config: NextTokenConfig) -> NextTokenLoss:
    """Return the loss that a configuration describes."""
    return NextTokenLoss(config)
