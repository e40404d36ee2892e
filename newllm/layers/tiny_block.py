"""TinyBlock: one transformer block, post-norm, that a recursive model applies again and again.

A: applications of the block to a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.layers.base import MLP
from newllm.linear import Linear


class TinyBlock(nn.Module):
    """a <- LN(a + Attention(a)), a <- LN(a + MLP(a)); causal softmax attention without position embedding.

    Not a `Layer`: what it keeps differs from application to application, so the model keeps it.

    Args:
        dim: hidden size.
        num_heads: heads; divides `dim`.
        mlp_dim: width of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = Linear(dim, 3 * dim)
        self.output = Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim)
        self.mlp_norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, and keys and values with those of this call at the end.

        Args:
            hidden: input [B, T, D].
            past_keys: of the tokens before [B, H, L, d].
            past_values: of the tokens before [B, H, L, d].
        """
        fused = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = fused.permute(2, 0, 3, 1, 4)  # [B, T, 3, H, d] -> 3 x [B, H, T, d]
        length, past = hidden.shape[1], past_keys.shape[2]
        if past > 0:
            keys = torch.cat([past_keys.to(keys.dtype), keys], dim=2)
            values = torch.cat([past_values.to(values.dtype), values], dim=2)
        is_visible = None
        if past > 0 and length > 1:
            is_visible = torch.ones(length, past + length, dtype=torch.bool, device=hidden.device).tril(diagonal=past)
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=is_visible, is_causal=past == 0
        )
        attended = self.output(attended.transpose(1, 2).flatten(2))  # [B, H, T, d] -> [B, T, D]
        hidden = self.attention_norm(hidden + attended)
        return self.mlp_norm(hidden + self.mlp(hidden)), keys, values

    def flops_per_token(self, length: int) -> int:
        """Return the matrix FLOPs per token of one application to a text of `length` tokens."""
        projections = 2 * (self.query_key_value.weight.numel() + self.output.weight.numel())
        # Scores and weighted values over the full square, masked half included.
        return projections + 4 * length * self.output.weight.shape[0] + self.mlp.flops_per_token()
