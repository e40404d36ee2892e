"""What the context models carry from token to token.

C: context size. D: width of a token embedding. k: token embeddings that enter a position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from newllm.state import State


@dataclass(frozen=True)
class ContextState(State):
    """Context of the last position [B, C], embeddings that the next position still reads [B, k - 1, D], tokens read per row, and the
    width of the states' other part, from which a model predicts.
    """

    context: Tensor
    window: Tensor
    positions: tuple[int, ...]
    predicting_dim: int = field(metadata={"shared": True})

    @property
    def hidden(self) -> Tensor:
        """What a recurrence feeds back [B, C + predicting_dim]: the context; the other part is never read and is zero."""
        unread = self.context.new_zeros(self.context.shape[0], self.predicting_dim)
        return torch.cat([self.context, unread], dim=-1)


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
