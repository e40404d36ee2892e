"""Rotary position embedding on the first dims of every head."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def _tables(
    length: int, rotary_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Tables made in a validation are used by training steps too: as inference tensors they would stop the backward pass.
    with torch.inference_mode(False):
        # float64: at base 10000 and long texts fp32 angles are off by more than the tolerance of the exactness tests.
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * base**-exponents
        angles = torch.cat([angles, angles], dim=-1)  # [length, rotary_dim]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(tensor_BHTd: Tensor, *, offset: int, rotary_dim: int, base: float) -> Tensor:
    """Return the queries or keys with their first `rotary_dim` dims rotated by their position.

    Scores of rotated queries and keys depend on the distance of their positions only.

    Args:
        tensor_BHTd: queries or keys [B, H, T, d].
        offset: position of the first of them, tokens.
        rotary_dim: dims of a head that are rotated; even, at most d.
        base: wavelength base, unitless.
    Source: RoFormer (Su et al., 2021), half-split layout of GPT-NeoX.
    """
    if rotary_dim == 0:
        return tensor_BHTd
    needed = offset + tensor_BHTd.shape[2]
    # Powers of two: stepping token by token then asks for few different tables.
    length = 1 << max(needed - 1, 127).bit_length()
    cos, sin = _tables(length, rotary_dim, base, tensor_BHTd.device, tensor_BHTd.dtype)
    cos, sin = cos[offset:needed], sin[offset:needed]
    turned, passed = tensor_BHTd[..., :rotary_dim], tensor_BHTd[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, passed], dim=-1)
