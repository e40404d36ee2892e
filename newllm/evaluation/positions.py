"""Loss by position in the block, and by segment of the text where there is a memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import hidden_states, token_losses
from newllm.evaluation.streaming import stream_states
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
        is_ascending = all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False))
        if is_ascending and self.edges[:1] == [0]:
            return []
        return [
            f"evaluation.positions.edges={self.edges}: is not ascending from 0. "
            "Allowed: 0, then each above the one before. Begin with 0, sort the list and drop repetitions."
        ]


def measure(material: Material, options: PositionsConfig) -> dict[str, list[dict[str, Any]]]:
    """Return loss (nats per token), perplexity and targets of each bucket of positions, token-weighted.

    The deployed function is scored: where texts are read in lanes the state goes on from block to block, elsewhere each block is a
    text of its own, from an empty state.

    Args:
        material: model and text.
        options: first positions of the buckets.
    Returns:
        `by_position`, of positions in the block; for models with memory layers also `by_segment`, of positions in the text: tokens
        between two writes, one bucket for each of the first block's segments, then two, four and so on as far as texts go.
    """
    length = material.run.config.data.block_length
    nats, targets = _by_place(material, length)  # [blocks of the longest text, T] each
    found = {"by_position": _buckets(nats.sum(0), targets.sum(0), _continued(options.edges, length))}
    segment_lengths = [
        layer.options.segment_length for layer in material.model.modules() if isinstance(layer, MemoryLayer)
    ]
    if segment_lengths:
        edges = _segment_edges(segment_lengths[0], length, nats.numel())
        found["by_segment"] = _buckets(nats.flatten(), targets.flatten(), edges)
    return found


def _by_place(material: Material, length: int) -> tuple[Tensor, Tensor]:
    """Nats and targets of each place of the texts, summed over texts: [blocks of the longest text, T] each."""
    nats: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}
    block_of_row: dict[int, int] = {}
    for batch, hidden in _states(material):
        losses, _ = token_losses(material.model, hidden, batch["labels"])
        losses, has_target = losses.cpu(), (batch["labels"] != NO_TARGET).long().cpu()
        for row in range(len(losses)):
            goes_on = material.data.in_lanes and not bool(batch["starts_text"][row, 0])
            block_of_row[row] = place = block_of_row[row] + 1 if goes_on else 0
            nats[place] = nats.get(place, 0) + losses[row]
            targets[place] = targets.get(place, 0) + has_target[row]
    return torch.stack(list(nats.values())), torch.stack(list(targets.values()))


def _states(material: Material) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    if material.data.in_lanes:
        return stream_states(material)
    return ((batch, hidden_states(material.model, batch["input_ids"])) for batch in material.batches())


def _segment_edges(segment_length: int, block_length: int, end: int) -> list[int]:
    """First position of each bucket of segments before `end`: every segment of the first block, then as many again each time."""
    edges = list(range(0, min(block_length, end), segment_length))
    first = edges[-1] + segment_length
    while first < end:
        edges.append(first)
        first *= 2
    return edges


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
