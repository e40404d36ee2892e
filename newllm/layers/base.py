"""What every layer is: a residual block that takes hidden states and its own state, and returns both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from newllm.linear import Linear
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

    def forward_level(
        self, hidden: Tensor, state: Any, shown: State | None, *, update_memory: bool = True
    ) -> tuple[Tensor, Any, State | None]:
        """Return hidden states, the next state, and what the same tokens' slots of higher levels may read of this one.

        For models that run a stack several times per token (models/selective.py). Here a level sees itself only: a layer that keeps
        sums and no single tokens has one memory per level, and lower levels reach a higher one by the residual stream.

        Args:
            hidden: input of this level [B, T, D].
            state: this level's state.
            shown: what the level below returned for these tokens; None at the lowest.
            update_memory: write memories; False reads them only.
        """
        hidden, next_state = self(hidden, state, update_memory=update_memory)
        return hidden, next_state, None

    def level_flops_per_token(self, length: int, num_below: int) -> float:
        """Return `flops_per_token` of a level that reads what `num_below` lower levels show."""
        return self.flops_per_token(length)

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
        self.up = Linear(dim, mlp_dim)
        self.down = Linear(mlp_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(hidden)))

    def flops_per_token(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())
