"""Feedback: how the state of the previous position enters the input of the next."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from newllm.linear import Linear

FeedbackKind = Literal["none", "additive", "gated"]


class Feedback(nn.Module):
    """u_t = E(x_t) + P(LN(h_{t-1})), with a gate on the second term if `kind` is "gated".

    P starts at zero: from the embedding's scale it would be ten times the token's term and the recurrence no contraction, so that
    sweeps need more than a hundred rounds to settle and training starts worse.

    Args:
        dim: hidden size.
        kind: "additive", or "gated" with g_t = sigmoid(W [E(x_t); LN(h_{t-1})]).
    """

    def __init__(self, dim: int, kind: Literal["additive", "gated"]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.projection = Linear(dim, dim, bias=False)
        if kind == "gated":
            self.feedback_gate = Linear(2 * dim, dim)
        self.is_gated = kind == "gated"

    def start_at_zero(self) -> None:
        """Set P to zero, so that the model starts as the same stack without feedback."""
        nn.init.zeros_(self.projection.weight)

    def forward(self, embedded: Tensor, previous_hidden: Tensor) -> Tensor:
        """Return the layers' input [B, T, D] from token embeddings and previous states of the same shape."""
        normed = self.norm(previous_hidden)
        fed_back = self.projection(normed)
        if self.is_gated:
            fed_back = torch.sigmoid(self.feedback_gate(torch.cat([embedded, normed], dim=-1))) * fed_back
        return embedded + fed_back

    def flops_per_token(self) -> int:
        """Return the forward pass's matrix FLOPs per token."""
        gate = self.feedback_gate.weight.numel() if self.is_gated else 0
        return 2 * (self.projection.weight.numel() + gate)
