"""Cross entropy of the next token: the one loss of language modelling here; targets come shifted from data/blocks.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from newllm.config.schema import LossConfig
from newllm.losses.linear_cross_entropy import (
    NO_TARGET,
    at_least_fp32,
    mean_nats,
    row_nats,
    rows_at_once,
    rows_of_chunks,
)
from newllm.models.base import LanguageModel


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
    rows = rows_at_once(hidden, model.vocab_size)
    head = model.linear_head(hidden.flatten(0, -2)) if targets.numel() > rows else None
    if head is not None:
        return row_nats(*head, targets.flatten(), rows=rows).view(targets.shape)
    logits = at_least_fp32(model.logits(hidden.flatten(0, -2)))
    nats = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET, reduction="none")
    return nats.view(targets.shape)


def mean_over_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of values [B, T, ...] over the positions with a target, a scalar.

    Picking them by a mask would have the host wait for the device, to learn how many there are.
    """
    is_target = (targets != NO_TARGET).view(*targets.shape, *[1] * (values.dim() - targets.dim()))
    return values.where(is_target, 0).sum() / is_target.expand_as(values).sum()


class NextTokenLoss(nn.Module):
    """Mean cross entropy over all targets of a batch, nats per token; `NO_TARGET` positions do not count.

    Where scores are one linear map they are made in chunks and the gradient with them, the same loss and gradients: on a CPU always,
    it reads and writes the logits fewer times; on a GPU where the logits of the batch would take more bytes than its limit.

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
        rows = rows_of_chunks(hidden, model.vocab_size)
        in_chunks = hidden.device.type == "cpu" or targets.numel() > rows
        head = model.linear_head(hidden.flatten(0, 1)) if in_chunks else None
        if head is not None:
            return mean_nats(*head, targets.flatten(), rows=rows)
        logits = at_least_fp32(model.logits(hidden)).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET)


def build(config: NextTokenConfig) -> NextTokenLoss:
    """Return the loss that a configuration describes."""
    return NextTokenLoss(config)
