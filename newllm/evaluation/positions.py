"""Loss by position in the block, and by segment where there is a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import hidden_states, token_losses
from newllm.layers.memory_layer import MemoryLayer
from newllm.losses.next_token import NO_TARGET


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(EvaluationConfig):
    """Buckets of positions."""

    edges: list[
        Annotated[int, Range(minimum=0)]
    ]  # first position of each bucket, ascending; after them the last step repeats

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values."""
        if self.edges and all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            return []
        return [
            f"evaluation.positions.edges={self.edges}: is not ascending. "
            "Allowed: at least one position, each above the one before. Sort the list and drop repetitions."
        ]


def measure(material: Material, options: PositionsConfig) -> dict[str, list[dict[str, Any]]]:
    """Return loss (nats per token), perplexity and targets of each bucket of positions, token-weighted.

    Args:
        material: model and text.
        options: first positions of the buckets.
    Returns:
        `by_position`, and for models with memory layers `by_segment`: buckets of the tokens between two writes.
    """
    length = material.run.config.data.block_length
    nats, targets = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    for batch in material.batches():
        losses, _ = token_losses(material.model, hidden_states(material.model, batch["input_ids"]), batch["labels"])
        nats += losses.sum(0).cpu()
        targets += (batch["labels"] != NO_TARGET).sum(0).cpu()
    found = {"by_position": _buckets(nats, targets, _continued(options.edges, length))}
    segment_lengths = [
        layer.options.segment_length for layer in material.model.modules() if isinstance(layer, MemoryLayer)
    ]
    if segment_lengths:
        found["by_segment"] = _buckets(nats, targets, list(range(0, length, segment_lengths[0])))
    return found


def _continued(edges: list[int], length: int) -> list[int]:
    """The edges below `length`, the last step between them repeated up to there."""
    step = edges[-1] - edges[-2] if len(edges) > 1 else length
    return [edge for edge in edges if edge < length] + list(range(edges[-1] + step, length, step))


def _buckets(nats: Tensor, targets: Tensor, edges: list[int]) -> list[dict[str, Any]]:
    found = []
    for first, end in zip(edges, [*edges[1:], len(targets)], strict=True):
        count = int(targets[first:end].sum())
        if count > 0:
            loss = float(nats[first:end].sum()) / count
            perplexity = math.exp(min(loss, 700))
            found.append({"positions": f"{first}-{end - 1}", "loss": loss, "perplexity": perplexity, "targets": count})
    return found
