"""Linear recurrences x_t = c A_t x_{t-1} + b_t, solved for all positions at once.

B: texts. T: positions. C: width of x. M: recurrences of the same factors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def linear_recurrence(factors_BTCC: Tensor, steps_BTCM: Tensor, scales_BM: Tensor) -> Tensor:
    """Return x_t = c A_t x_{t-1} + b_t at all positions [B, T, C, M], from x = 0 before the first; gradients of any order reach the steps.

    The positions are cut into chunks that are solved side by side, each from zeros and with the product of its factors, which carries
    the end of the chunk before across it: 2 sqrt(T) products in turn instead of T. On a CPU each chunk is one position, for
    the products of matrices cost C times those of matrices and vectors, and turns cost little.

    Args:
        factors_BTCC: A [B, T, C, C]; no gradient reaches them.
        steps_BTCM: b [B, T, C, M].
        scales_BM: c [B, M]; no gradient reaches them.
    Source: the two levels of a parallel scan (Blelloch, 1990).
    """
    chunk = 1 if steps_BTCM.device.type == "cpu" else math.isqrt(steps_BTCM.shape[1])
    return _Recurrence.apply(factors_BTCC, steps_BTCM, scales_BM.unsqueeze(1), chunk)


class _Recurrence(torch.autograd.Function):
    """On the way back each position gives to the one before: the same recurrence over reversed positions with transposed factors."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, steps: Tensor, scales: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(factors, scales)
        ctx.chunk = chunk
        return _solved(factors, steps, scales, chunk)

    @staticmethod
    def backward(ctx: Any, by_states: Tensor) -> tuple[Tensor | None, ...]:
        factors, scales = ctx.saved_tensors
        # Of the last position nothing is given on: its factor, now the first, meets the zeros before it.
        reversed_factors = factors.mT.flip(1).roll(1, dims=1)
        return None, _Recurrence.apply(reversed_factors, by_states.flip(1), scales, ctx.chunk).flip(1), None, None


def _solved(factors: Tensor, steps: Tensor, scales: Tensor, chunk: int) -> Tensor:
    batch_size, length, width, _ = steps.shape
    surplus = -length % chunk
    if surplus > 0:
        factors = torch.cat([factors, factors.new_zeros(batch_size, surplus, width, width)], dim=1)
        steps = torch.cat([steps, steps.new_zeros(batch_size, surplus, *steps.shape[2:])], dim=1)
    by_place = factors.unflatten(1, (-1, chunk)).unbind(2)  # [B, n, C, C] of every place in a chunk
    added = steps.unflatten(1, (-1, chunk)).unbind(2)  # [B, n, C, M]
    by_chunk = scales.unsqueeze(1)
    across, end = by_place[0], added[0]
    for factor, step in zip(by_place[1:], added[1:], strict=True):
        across, end = factor @ across, factor @ end * by_chunk + step
    start = torch.zeros_like(end[:, 0])
    starts = [start]
    for product, own in zip(across.unbind(1)[:-1], end.unbind(1)[:-1], strict=True):
        start = torch.addcmul(own, product @ start, scales**chunk)
        starts.append(start)
    states, made = torch.stack(starts, dim=1), []
    for factor, step in zip(by_place, added, strict=True):
        states = torch.addcmul(step, factor @ states, by_chunk)
        made.append(states)
    return torch.stack(made, dim=2).flatten(1, 2)[:, :length]
