"""Several memories, written in turn; each position chooses between them by where their keys lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LayerConfig
from newllm.layers.banks import Snapshots, shares
from newllm.layers.memory_layer import MemoryConfig, MemoryLayer, Recall

# Sums of positive features all point much the same way: at 1 the softmax over their cosines is flat, and stays so.
INITIAL_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class MultiMemoryConfig(MemoryConfig, LayerConfig):
    """Memories that each position chooses between.

    Attributes:
        num_memories: memories that are written in turn, a segment each.
    """

    num_memories: Annotated[int, Range(minimum=1)]


class MultiMemoryLayer(MemoryLayer):
    """Compressive memories read with shares that each position decides for itself, per head.

    The share of memory i at position t is softmax_i(tau * cos(q_t, z_i)) over the memories that hold something: it depends on
    no later position, and not on how much was written.

    Args:
        dim: hidden size.
        num_heads: unused; memory and local attention share `config.memory_heads`.
        mlp_dim: width of the MLP.
        config: memory options.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, config: MultiMemoryConfig) -> None:
        super().__init__(dim, mlp_dim, config, num_banks=config.num_memories, segments_per_bank=1)
        self.selection_gate = selection_gate()

    def recall(self, banks: Snapshots) -> Recall:
        weights = choose(banks, self.selection_gate)
        return Recall(banks.read_shares(weights), weights)

    def recall_flops(self, lengths: Sequence[int]) -> float:
        return super().recall_flops(lengths) + choice_flops(self, sum(lengths))

    def facts(self, decisions: Tensor) -> dict[str, Tensor]:
        return {"selection_entropy": torch.special.entr(decisions).sum(1)}  # nats


def choice_flops(layer: MemoryLayer, length: int) -> float:
    """Return the matrix FLOPs on one head of choosing between a layer's memories at every position."""
    return 2 * length * layer.num_banks * layer.head_dim


def selection_gate() -> nn.Parameter:
    """Return log tau, the sharpness with which positions choose; a gate to the optimizer, which trains these faster."""
    return nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))


def choose(banks: Snapshots, log_scale: Tensor) -> Tensor:
    """Return the share [B, N, H, m] of each memory in the answer to each of the open segment's queries.

    Args:
        banks: memories, with a segment open.
        log_scale: log tau.
    """
    cosines = banks.cosines()
    has_content = banks.has_content().view(*cosines.shape[:2], 1, 1)
    return shares(log_scale.to(cosines.dtype).exp() * cosines, has_content)
