"""Loss by position in the block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import hidden_states, token_losses
from newllm.losses.next_token import NO_TARGET


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(EvaluationConfig):
    """Buckets of positions."""

    edges: list[Annotated[int, Range(minimum=0)]]  # first position of each bucket, ascending

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        if self.edges and all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            return []
        return [
            f"evaluation.positions.edges={self.edges}: is not ascending. "
            "Allowed: at least one position, each above the one before. Sort the list and drop repetitions."
        ]


def measure(material: Material, options: PositionsConfig) -> list[dict[str, Any]]:
    """Return loss (nats per token), perplexity and targets of each bucket of positions, token-weighted.

    Args:
        material: model and text.
        options: first position of each bucket; a bucket ends where the next begins, the last at the end of the block.
    """
    length = material.run.config.data.block_length
    nats, targets = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    for batch in material.batches():
        losses, _ = token_losses(material.model, hidden_states(material.model, batch["input_ids"]), batch["labels"])
        nats += losses.sum(0).cpu()
        targets += (batch["labels"] != NO_TARGET).sum(0).cpu()
    edges = [edge for edge in options.edges if edge < length]
    found = []
    for first, end in zip(edges, [*edges[1:], length], strict=True):
        count = int(targets[first:end].sum())
        if count == 0:
            continue
        loss = float(nats[first:end].sum()) / count
        found.append(
            {"positions": f"{first}-{end - 1}", "loss": loss, "perplexity": math.exp(min(loss, 700)), "targets": count}
        )
    return found
