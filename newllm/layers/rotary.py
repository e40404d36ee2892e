"""Rotary position embedding on the first dims of every head."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Factors = tuple[Tensor, Tensor, Tensor]
"""What every dim of a head is multiplied by [length, d]: itself, the one half a rotation behind it, the one half a rotation before it."""


@lru_cache(maxsize=32)
def _factors(
    length: int, head_dim: int, rotary_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Factors:
    # Factors made in a validation are used by training steps too: as inference tensors they would stop the backward pass.
    with torch.inference_mode(False):
        # float64: at base 10000 and long texts fp32 angles are off by more than the tolerance of the exactness tests.
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * base**-exponents
        half, zeros = rotary_dim // 2, angles.new_zeros(length, head_dim)
        own, behind, before = zeros + 1, zeros.clone(), zeros
        own[:, :rotary_dim] = angles.cos().repeat(1, 2)
        behind[:, :half] = -angles.sin()
        before[:, half:rotary_dim] = angles.sin()
        return own.to(dtype), behind.to(dtype), before.to(dtype)


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
    length, head_dim = tensor_BHTd.shape[2:]
    needed = offset + length
    # Powers of two: stepping token by token then asks for few different factors.
    most = 1 << max(needed - 1, 127).bit_length()
    # What is made under a tracer stands for numbers, has none, and must not be kept.
    is_traced = torch.compiler.is_compiling() or isinstance(tensor_BHTd, FakeTensor)
    make = _factors.__wrapped__ if is_traced else _factors
    factors = make(most, head_dim, rotary_dim, base, tensor_BHTd.device, tensor_BHTd.dtype)
    return _Rotate.apply(tensor_BHTd, *(factor[offset:needed] for factor in factors), rotary_dim // 2, 1)


class _Rotate(torch.autograd.Function):
    """Goes over whole heads: a product of a few dims of each takes longer than one of all, and their slices' gradients much longer.

    A text's heads are one line of numbers, in which the other half of a rotation is a fixed distance away: a dim that has none is
    multiplied by 0.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, own: Tensor, behind: Tensor, before: Tensor, half: int, sign: int) -> Tensor:
        ctx.save_for_backward(own, behind, before)
        ctx.half, ctx.sign = half, sign
        tensor = tensor.contiguous()
        turned = tensor * own
        line, given = turned.flatten(2), tensor.flatten(2)  # [B, H, T * d]
        line[..., :-half].addcmul_(given[..., half:], behind.flatten()[:-half], value=sign)
        line[..., half:].addcmul_(given[..., :-half], before.flatten()[half:], value=sign)
        return turned

    @staticmethod
    def backward(ctx: Any, by_turned: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotate.apply(by_turned, *ctx.saved_tensors, ctx.half, -ctx.sign), None, None, None, None, None
