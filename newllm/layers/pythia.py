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
from newllm.linear import Linear
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

    @property
    def looks_back(self) -> bool:
        """Whether a position attends to others than itself."""
        return self.window != 1


@dataclass(frozen=True)
class PythiaState(State):
    """Keys before rotation and values [B, H, L, d] of the tokens still in reach, right-aligned, and how many each row has."""

    keys: Tensor = field(metadata={"ragged": True})
    values: Tensor = field(metadata={"ragged": True})
    lengths: tuple[int, ...]

    def last(self, length: int) -> PythiaState:
        """Return the state with the last tokens only, in the given number or as many as there are."""
        first = max(0, self.keys.shape[2] - length)
        lengths = tuple(min(length, own) for own in self.lengths)
        return PythiaState(self.keys[:, :, first:], self.values[:, :, first:], lengths)


@dataclass(frozen=True)
class PythiaLevels(State):
    """A level's state beside the keys and values [B, n*H, L, d] of n levels: of every token in reach, those of the call included."""

    own: PythiaState
    shown: PythiaState


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
        self.query_key_value = Linear(dim, 3 * dim)
        self.output = Linear(dim, dim)
        self.mlp = MLP(dim, mlp_dim)

    def initial_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> PythiaState:
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return PythiaState(empty, empty, (0,) * batch_size)

    def forward(self, hidden: Tensor, state: PythiaState, *, update_memory: bool = True) -> tuple[Tensor, PythiaState]:
        hidden, next_state, _ = self.forward_level(hidden, state, None, update_memory=update_memory)
        return hidden, next_state

    def forward_level(
        self, hidden: Tensor, state: PythiaState, shown: State | None, *, update_memory: bool = True
    ) -> tuple[Tensor, PythiaState, PythiaState]:
        """Attend to this level's tokens and to those that lower levels show, at positions up to the own; show both upwards."""
        if shown is None:
            nothing = hidden.new_zeros(hidden.shape[0], 0, 0, self.head_dim)
            shown = PythiaState(nothing, nothing, state.lengths)
        assert isinstance(shown, PythiaState), "a layer is shown what the same layer returned a level below"
        levels = PythiaLevels(state, shown)
        attended, levels = by_groups(self._attend, self.attention_norm(hidden), levels, state.lengths)
        return hidden + attended + self.mlp(self.mlp_norm(hidden)), levels.own, levels.shown

    def level_flops_per_token(self, length: int, num_below: int) -> float:
        return self.flops_per_token(length) + num_below * 4 * length * self.num_heads * self.head_dim

    def flops_per_token(self, length: int) -> float:
        projections = 2 * (self.query_key_value.weight.numel() + self.output.weight.numel())
        # Scores and weighted values over the full square: what dense attention multiplies, masked half included.
        return projections + 4 * length * self.num_heads * self.head_dim + self.mlp.flops_per_token()

    def state_bytes(self, length: int) -> int:
        return 2 * self._kept(length) * self.num_heads * self.head_dim * 4

    def _kept(self, length: int) -> int:
        return length if self.window is None else min(length, self.window - 1)

    def _attend(self, normed: Tensor, levels: PythiaLevels) -> tuple[Tensor, PythiaLevels]:
        """Attention for rows that have equally many tokens in reach."""
        batch_size, length = normed.shape[:2]
        past = levels.own.lengths[0]
        fused = self.query_key_value(normed).unflatten(-1, (self.num_heads, 3 * self.head_dim)).transpose(1, 2)
        queries, keys, values = fused.chunk(3, dim=-1)  # [B, T, 3*D] -> 3 x [B, H, T, d]
        if past > 0:
            keys = torch.cat([levels.own.keys[:, :, -past:].to(keys.dtype), keys], dim=2)
            values = torch.cat([levels.own.values[:, :, -past:].to(values.dtype), values], dim=2)
        kept = self._kept(past + length)
        own = PythiaState(
            keys[:, :, keys.shape[2] - kept :], values[:, :, values.shape[2] - kept :], (kept,) * batch_size
        )
        num_below = levels.shown.keys.shape[1] // self.num_heads
        if num_below > 0:
            reach = slice(levels.shown.keys.shape[2] - keys.shape[2], None)
            keys = torch.cat([levels.shown.keys[:, :, reach], keys], dim=1)
            values = torch.cat([levels.shown.values[:, :, reach], values], dim=1)  # [B, (n+1)*H, L, d]
        # Keys are kept unrotated and counted from the oldest in reach: only distances matter, and rows need not agree on positions.
        turned = rotate(queries, offset=past, rotary_dim=self.rotary_dim, base=self.rotary_base)
        turned_keys = rotate(keys, offset=0, rotary_dim=self.rotary_dim, base=self.rotary_base)
        attended = nn.functional.scaled_dot_product_attention(
            turned,
            self._side_by_side(turned_keys),
            self._side_by_side(values),
            **self._mask(past, length, num_below, normed.device),
        )
        shown = PythiaState(keys, values, (past + length,) * batch_size)
        return self.output(attended.transpose(1, 2).flatten(2)), PythiaLevels(own, shown)

    def _side_by_side(self, levels: Tensor) -> Tensor:
        """Levels on the head axis [B, n*H, L, d] to levels one after another [B, H, n*L, d]."""
        if levels.shape[1] == self.num_heads:
            return levels
        return levels.unflatten(1, (-1, self.num_heads)).transpose(1, 2).flatten(2, 3)

    def _mask(self, past: int, length: int, num_below: int, device: torch.device) -> dict:
        """Arguments of the attention kernel: its causal path where that is all, no mask for one token that sees everything."""
        reaches_all = self.window is None or past + length <= self.window
        if reaches_all and past == 0 and num_below == 0:
            return {"is_causal": True}
        if reaches_all and length == 1:
            return {}
        distance = torch.arange(past, past + length, device=device).unsqueeze(1) - torch.arange(
            past + length, device=device
        )
        is_visible = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        return {"attn_mask": is_visible.repeat(1, num_below + 1)}
