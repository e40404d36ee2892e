"""Fine memories, written in turn, under a coarse one that is their sum; each position decides how far to look into the fine ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LayerConfig
from newllm.layers.banks import Snapshots
from newllm.layers.kernels import take_positions
from newllm.layers.memory import Sums
from newllm.layers.memory_layer import MemoryConfig, MemoryLayer, Recall
from newllm.layers.multi_memory import choice_flops, choose, selection_gate
from newllm.linear import Linear

EXPANSION_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(MemoryConfig, LayerConfig):
    """Fine memories under their sum.

    Attributes:
        num_memories: fine memories that are written in turn, a segment each.
        expand_threshold: in evaluation, positions whose expansion is below it read the coarse memory only; null reads both everywhere.
    """

    num_memories: Annotated[int, Range(minimum=1)]
    expand_threshold: Annotated[float, Range(minimum=0, maximum=1)] | None

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with the layer's options in this model."""
        problems = super().check(config)
        if self.mix == "joint":
            problems.append(
                "layers.mix=joint: gives memory and local attention one normaliser, coarse and fine memories of kind hierarchical "
                "have two. Allowed: gate. Set layers.mix=gate or take the kind multi_memory."
            )
        return problems


class HierarchicalLayer(MemoryLayer):
    """Answers p * fine + (1 - p) * coarse, with p decided per position from the coarse answer.

    The coarse memory is the sum of the fine ones, not stored. The fine answer is that of `MultiMemoryLayer`. With a threshold, fine
    memories are read in evaluation only for positions whose p reaches it.

    Args:
        dim: hidden size.
        num_heads: unused; memory and local attention share `config.memory_heads`.
        mlp_dim: width of the MLP.
        config: memory options.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, config: HierarchicalConfig) -> None:
        super().__init__(dim, mlp_dim, config, num_banks=config.num_memories, segments_per_bank=1)
        self.expand_threshold = config.expand_threshold
        self.selection_gate = selection_gate()
        self.expansion_gate = nn.Sequential(Linear(dim, EXPANSION_WIDTH), nn.ReLU(), Linear(EXPANSION_WIDTH, 1))

    @property
    def reads_side_by_side(self) -> bool:
        # Where the gate saves reads, as many positions are read in every row as in the one that wants most.
        return self.training or self.expand_threshold is None

    def recall(self, banks: Snapshots) -> Recall:
        coarse = banks.read_total().answers()
        hidden = coarse.transpose(1, 2).flatten(2).to(self.selection_gate.dtype)  # [B, H, m, d] -> [B, m, H*d]
        expansion = torch.sigmoid(self.expansion_gate(hidden)).squeeze(-1).to(coarse.dtype)
        if self.training or self.expand_threshold is None:
            fine = banks.read_shares(choose(banks, self.selection_gate)).answers()
            return Recall(Sums(torch.lerp(coarse, fine, expansion[:, None, :, None]), None), expansion)
        answers = self._expand(banks, coarse, expansion, expansion >= self.expand_threshold)
        return Recall(Sums(answers, None), expansion)

    def recall_flops(self, lengths: Sequence[int]) -> float:
        fine = super().recall_flops(lengths) + choice_flops(self, sum(lengths))
        coarse = self.kernel.recall_flops(lengths, 1, self.head_dim)
        gate = 2 * sum(lengths) * sum(p.numel() for p in self.expansion_gate.parameters() if p.dim() == 2)
        return fine + coarse + gate / self.num_heads

    def facts(self, decisions: Tensor) -> dict[str, Tensor]:
        threshold = 0.0 if self.training or self.expand_threshold is None else self.expand_threshold
        return {"expansion_mean": decisions, "expanded_share": decisions >= threshold}

    def _expand(self, banks: Snapshots, coarse: Tensor, expansion: Tensor, is_expanded: Tensor) -> Tensor:
        """The coarse answers, with fine ones mixed in where `is_expanded` [B, m]: only for those positions they are read."""
        most = int(is_expanded.sum(1).max())
        if most == 0:
            return coarse
        index = is_expanded.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, K]
        weights = choose(banks, self.selection_gate)
        chosen = torch.take_along_dim(weights, index[:, None, None], dim=-1)
        fine = banks.read_shares(chosen, banks.kernel.take(banks.segment, index)).answers()
        # Rows with fewer expanded positions fill up with others, whose expansion is 0.
        change = torch.take_along_dim(expansion * is_expanded, index, dim=1)[:, None, :, None] * (
            fine - take_positions(coarse, index)
        )
        return coarse.scatter_add(2, index[:, None, :, None].expand_as(change), change)
