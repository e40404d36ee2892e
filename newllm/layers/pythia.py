"""The published Pythia (GPT-NeoX) layer: rotary softmax attention beside an MLP, each with its own LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from newllm.config.fields import Range
from newllm.config.schema import LayerConfig
from newllm.layers.base import MLP, Layer
from newllm.layers.rotary import rotate
from newllm.state import State, by_groups


@dataclass(frozen=True, kw_only=True)
class PythiaConfig(LayerConfig):
    """Softmax attention.

    Attributes:
        rotary_share: share of each head's dims that carry position; 0 leaves position out.
        rotary_base: wavelength base of the rotary embedding, unitless.
        window: tokens a position attends to, itself included; null attends to all before it.
    """

    rotary_share: Annotated[float, Range(minimum=0, maximum=1)]
    rotary_base: Annotated[float, Range(above=1)]
    window: Annotated[int, Range(minimum=1)] | None


@dataclass(frozen=True)
class PythiaState(State):
    """Keys before rotation and values [B, H, L, d] of the tokens still in reach, right-aligned, and how many each row has."""

    keys: Tensor = field(metadata={"ragged": True})
    values: Tensor = field(metadata={"ragged": True})
    lengths: tuple[int, ...]


class PythiaLayer(Layer):
    """y = x + Attention(LN1 x) + MLP(LN2 x), fused query-key-value projection with bias, weights laid out as GPT-NeoX has them.

    Args:
        dim: hidden size.
        num_heads: heads; divides `dim`.
        mlp_dim: width of the MLP.
        config: attention options.
    Source: Pythia (Biderman et al., 2023); GPT-NeoX-20B (Black et al., 2022), parallel residual.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, config: PythiaConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.rotary_dim = int(self.head_dim * config.rotary_share) // 2 * 2
        self.rotary_base, self.window = config.rotary_base, config.window
        self.attention_norm = nn.LayerNorm(dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.mlp = MLP(dim, mlp_dim)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> PythiaState:
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return PythiaState(empty, empty, (0,) * batch_size)

    def forward(self, hidden: Tensor, state: PythiaState, *, update_memory: bool = True) -> tuple[Tensor, PythiaState]:
        attended, next_state = by_groups(self._attend, self.attention_norm(hidden), state, state.lengths)
        return hidden + attended + self.mlp(self.mlp_norm(hidden)), next_state

    def flops_per_token(self, length: int) -> float:
        projections = 2 * (self.query_key_value.weight.numel() + self.output.weight.numel())
        # Scores and weighted values over the full square: what dense attention multiplies, masked half included.
        return projections + 4 * length * self.num_heads * self.head_dim + self.mlp.flops_per_token()

    def state_bytes(self, length: int) -> int:
        return 2 * self._kept(length) * self.num_heads * self.head_dim * 4

    def _kept(self, length: int) -> int:
        return length if self.window is None else min(length, self.window - 1)

    def _attend(self, normed: Tensor, state: PythiaState) -> tuple[Tensor, PythiaState]:
        """Attention for rows that have equally many tokens in reach."""
        batch_size, length = normed.shape[:2]
        past = state.lengths[0]
        fused = self.query_key_value(normed).unflatten(-1, (self.num_heads, 3 * self.head_dim)).transpose(1, 2)
        queries, keys, values = fused.chunk(3, dim=-1)  # [B, T, 3*D] -> 3 x [B, H, T, d]
        if past > 0:
            keys = torch.cat([state.keys[:, :, -past:].to(keys.dtype), keys], dim=2)
            values = torch.cat([state.values[:, :, -past:].to(values.dtype), values], dim=2)
        # Keys are kept unrotated and counted from the oldest in reach: only distances matter, and rows need not agree on positions.
        turned = rotate(queries, offset=past, rotary_dim=self.rotary_dim, base=self.rotary_base)
        turned_keys = rotate(keys, offset=0, rotary_dim=self.rotary_dim, base=self.rotary_base)
        attended = nn.functional.scaled_dot_product_attention(
            turned, turned_keys, values, **self._mask(past, length, normed.device)
        )
        kept = self._kept(past + length)
        next_state = PythiaState(
            keys[:, :, keys.shape[2] - kept :], values[:, :, values.shape[2] - kept :], (kept,) * batch_size
        )
        return self.output(attended.transpose(1, 2).flatten(2)), next_state

    def _mask(self, past: int, length: int, device: torch.device) -> dict:
        """Arguments of the attention kernel: its causal path where that is all, no mask for one token that sees everything."""
        reaches_all = self.window is None or past + length <= self.window
        if reaches_all and past == 0:
            return {"is_causal": True}
        if reaches_all and length == 1:
            return {}
        distance = torch.arange(past, past + length, device=device).unsqueeze(1) - torch.arange(
            past + length, device=device
        )
        is_visible = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        return {"attn_mask": is_visible}
