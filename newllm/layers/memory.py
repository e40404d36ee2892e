"""Compressive memory: associations kept as matrices of a fixed size, written a segment at a time and read by every later position.

N: memory banks of a layer. S: tokens of the segment that is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from newllm.state import State

WriteRule = Literal["linear", "delta"]


@dataclass(frozen=True)
class LinearMemory(State):
    """Associations [B, N, H, d, d] (key x value) and normaliser [B, N, H, d]; a bank is empty while its normaliser is zero."""

    matrix: Tensor
    norm: Tensor

    def is_empty(self) -> Tensor:
        """Return True for banks never written, [B, N]."""
        return self.norm.sum(dim=(2, 3)) == 0


class Reading(NamedTuple):
    """What a memory answers, before normalisation: numerator [B, N, H, T, d] and denominator [B, N, H, T, 1]."""

    numerator: Tensor
    denominator: Tensor

    def values(self) -> Tensor:
        """Return values [B, N, H, T, d]: zeros where there is nothing to read."""
        return divide(self.numerator, self.denominator)


def feature_map(tensor: Tensor) -> Tensor:
    """Return ELU + 1 elementwise: positive, so that a normaliser of sums never vanishes once something is written.

    Source: Linear Transformers (Katharopoulos et al., 2020), section 3.2.
    """
    return nn.functional.elu(tensor) + 1


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, 0 where the denominator is 0, with finite gradients there too."""
    is_zero = denominator == 0
    return (numerator / denominator.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)


def empty_memory(
    batch_size: int, num_banks: int, num_heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> LinearMemory:
    """Return a memory that was never written."""
    shape = (batch_size, num_banks, num_heads, head_dim)
    return LinearMemory(
        torch.zeros(*shape, head_dim, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
    )


def memory_bytes(num_banks: int, num_heads: int, head_dim: int) -> int:
    """Return the bytes of one text's memory in fp32."""
    return 4 * num_banks * num_heads * head_dim * (head_dim + 1)


def read(memory: LinearMemory, features_BHTd: Tensor) -> Reading:
    """Return what every bank associates with each query.

    Args:
        memory: what was written so far.
        features_BHTd: queries after the feature map.
    Source: Infini-attention (Munkhdalai et al., 2024), eq. 3. Differs: zeros, not 0/0, while a bank is empty.
    """
    queries = features_BHTd.unsqueeze(1)  # [B, 1, H, T, d]
    return Reading(queries @ memory.matrix, queries @ memory.norm.unsqueeze(-1))


def write(memory: LinearMemory, bank: int, features_BHSd: Tensor, values_BHSd: Tensor, rule: WriteRule) -> LinearMemory:
    """Return the memory with one segment written to one bank; associations and normaliser sum over the same tokens.

    Args:
        memory: what was written so far.
        bank: index of the bank to write.
        features_BHSd: keys of the segment after the feature map.
        values_BHSd: values of the segment.
        rule: "linear" adds the values; "delta" adds what the bank does not already answer for the keys.
    Source: Infini-attention, eq. 4 (linear) and 5 (delta).
    """
    matrix, norm = memory.matrix[:, bank], memory.norm[:, bank]
    if rule == "delta":
        values_BHSd = values_BHSd - divide(features_BHSd @ matrix, features_BHSd @ norm.unsqueeze(-1))
    matrix = matrix + features_BHSd.transpose(-1, -2) @ values_BHSd
    norm = norm + features_BHSd.sum(dim=2)
    return LinearMemory(_replace(memory.matrix, bank, matrix), _replace(memory.norm, bank, norm))


def _replace(banks: Tensor, bank: int, changed: Tensor) -> Tensor:
    """Return the banks [B, N, ...] with one of them changed, out of place."""
    if banks.shape[1] == 1:
        return changed.unsqueeze(1)
    return torch.cat([banks[:, :bank], changed.unsqueeze(1), banks[:, bank + 1 :]], dim=1)
