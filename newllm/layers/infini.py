"""Infini-attention: linear attention inside a segment, a compressive memory of all segments before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from newllm.config.fields import Range
from newllm.config.schema import LayerConfig
from newllm.layers.banks import Snapshots, shares
from newllm.layers.memory_layer import MemoryConfig, MemoryLayer, Recall


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(MemoryConfig, LayerConfig):
    """Banks that are written in turn and read with learned shares.

    Attributes:
        num_memory_banks: memories that are written in turn.
        segments_per_bank: segments written to a bank before the next one's turn.
    """

    num_memory_banks: Annotated[int, Range(minimum=1)]
    segments_per_bank: Annotated[int, Range(minimum=1)]


class InfiniLayer(MemoryLayer):
    """Compressive memory in one or several banks; several are read with shares that do not depend on the query.

    Args:
        dim: hidden size.
        num_heads: unused; memory and local attention share `config.memory_heads`.
        mlp_dim: width of the MLP.
        config: memory options.
    Source: Infini-attention (Munkhdalai et al., 2024). Differs: one wide head by default, linear local attention by default.
    """

    recalls_as_bank = True

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, config: InfiniConfig) -> None:
        super().__init__(
            dim, mlp_dim, config, num_banks=config.num_memory_banks, segments_per_bank=config.segments_per_bank
        )
        if self.num_banks > 1:
            self.bank_gate = nn.Parameter(torch.zeros(self.num_banks))

    def recall(self, banks: Snapshots) -> Recall:
        if self.num_banks == 1:
            return Recall(banks.read_only(), None)
        has_content = banks.has_content()
        weights = shares(self.bank_gate.to(banks.segment.values.dtype).expand(has_content.shape), has_content)
        return Recall(banks.read_shares(weights[..., None, None]), None)
