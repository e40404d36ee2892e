"""What every layer is: a residual block that takes hidden states and its own state, and returns both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from newllm.state import State


class Layer(nn.Module, ABC):
    """A causal block over [B, T, D]; `forward(hidden, state)` in any chunking gives the same result as one pass."""

    @abstractmethod
    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the empty state of `batch_size` texts."""

    @abstractmethod
    def forward(self, hidden: Tensor, state: Any, *, update_memory: bool = True) -> tuple[Tensor, Any]:
        """Return hidden states [B, T, D] and the next state.

        Args:
            hidden: input [B, T, D].
            state: what `initial_state` or the previous call returned.
            update_memory: write memories; False reads them only.
        """

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Return the forward pass's matrix FLOPs per token of a text of `length` tokens read from its start."""

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Return the bytes of one text's state after `length` tokens, in fp32."""


class MLP(nn.Module):
    """Two linear maps with the exact GELU between."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, mlp_dim)
        self.down = nn.Linear(mlp_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(hidden)))

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())
