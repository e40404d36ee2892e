"""What the context models carry from token to token.

C: context size. D: width of what the prediction is read from. k: token embeddings that enter a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from newllm.state import State


@dataclass(frozen=True)
class ContextState(State):
    """Context of the last position [B, C], embeddings that the next position still reads [B, k - 1, D], tokens read per row."""

    context: Tensor
    window: Tensor
    positions: tuple[int, ...]

    @property
    def hidden(self) -> Tensor:
        """What a recurrence feeds back, [B, C + D]: the context; the part that only predicts is never read and is zero."""
        unread = self.context.new_zeros(self.context.shape[0], self.window.shape[2])
        return torch.cat([self.context, unread], dim=-1)


def empty_context_state(
    batch_size: int,
    *,
    context_dim: int,
    token_dim: int,
    num_input_tokens: int = 1,
    device: torch.device,
    dtype: torch.dtype,
) -> ContextState:
    """Return the state of texts that have not begun.

    Args:
        batch_size: B.
        context_dim: C.
        token_dim: D.
        num_input_tokens: k.
        device: of the tensors.
        dtype: of the tensors.
    """
    context = torch.zeros(batch_size, context_dim, device=device, dtype=dtype)
    window = torch.zeros(batch_size, num_input_tokens - 1, token_dim, device=device, dtype=dtype)
    return ContextState(context, window, (0,) * batch_size)


def token_window(embedded_BTD: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every position the embeddings of the last k tokens side by side, oldest first, and those the next tokens still need.

    Args:
        embedded_BTD: token embeddings.
        before: the k - 1 embeddings before them [B, k - 1, D]; zeros before a text begins.
    Returns:
        Inputs [B, T, k*D] and the last k - 1 embeddings [B, k - 1, D].
    """
    length, size = embedded_BTD.shape[1], before.shape[1] + 1
    padded = torch.cat([before.to(embedded_BTD.dtype), embedded_BTD], dim=1)  # [B, k - 1 + T, D]
    windows = padded.unfold(1, size, 1).transpose(2, 3).flatten(2)  # [B, T, D, k] -> [B, T, k*D]
    return windows, padded[:, length:]
