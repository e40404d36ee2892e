"""How a proposed change enters a context: the unstable addition, and its cures.

C: context size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from newllm.linear import Linear

UpdateKind = Literal["additive", "convex", "dual", "ema", "gated", "layernorm"]

EMA_KEPT = 0.9
LONG_KEPT = 0.99


class ContextUpdate(nn.Module):
    """c_t from c_{t-1} and the hidden units h of the position, with the proposed change delta = W h.

    Args:
        context_dim: C; even for "dual".
        hidden_dim: width of h.
        kind: "additive" c + delta, which nothing bounds; "layernorm" LN(c + delta); "gated" LN(f*c + i*delta) with sigmoid gates of h;
            "convex" (1 - g)*c + g*delta; "ema" 0.9*c + 0.1*delta; "dual" a short half, additive, beside a long half that keeps 0.99.
    """

    def __init__(self, context_dim: int, hidden_dim: int, kind: UpdateKind) -> None:
        super().__init__()
        self.kind = kind
        self.change = Linear(hidden_dim, context_dim)
        num_gates = {"gated": 2, "convex": 1}.get(kind, 0)
        self.gates = nn.ModuleList(Linear(hidden_dim, context_dim) for _ in range(num_gates))
        self.norm = nn.LayerNorm(context_dim) if kind in ("gated", "layernorm") else nn.Identity()

    def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Return the next context [..., C].

        Args:
            context: of the position before [..., C].
            hidden: of this position [..., hidden_dim].
        """
        change = self.change(hidden)
        if self.kind == "ema":
            return EMA_KEPT * context + (1 - EMA_KEPT) * change
        if self.kind == "dual":
            short, long = context.chunk(2, dim=-1)
            short_change, long_change = change.chunk(2, dim=-1)
            return torch.cat([short + short_change, LONG_KEPT * long + (1 - LONG_KEPT) * long_change], dim=-1)
        gates = [torch.sigmoid(gate(hidden)) for gate in self.gates]
        if self.kind == "convex":
            return (1 - gates[0]) * context + gates[0] * change
        if self.kind == "gated":
            return self.norm(gates[0] * context + gates[1] * change)
        return self.norm(context + change)
