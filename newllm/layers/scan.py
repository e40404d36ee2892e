"""What segments find in the sums they are added to one after another, each call one node for autograd instead of some per segment.

n: segments. N: sums; a segment is added to one of them. The way back goes over the segments from the last to the first by the same rule,
so gradients have gradients of any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def running_sums(start: Tensor, steps: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what each step finds in its sum [n, ...], and all sums after the last step [N, ...].

    Args:
        start: sums before the first step [N, ...].
        steps: what is added [n, ...].
        targets: the sum that each step is added to.
    """
    return _RunningSums.apply(start, steps, tuple(targets), False)


def delta_rule(
    start: Tensor, keys: Tensor, asked: Tensor, values: Tensor, targets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what segments find in their matrices [n, B, H, d, d], all matrices after them [N, B, H, d, d], and what they write.

    A segment that finds M writes W = V + A M [n, B, H, L, d], and leaves M + K^T W.

    Args:
        start: matrices before the first segment [N, B, H, d, d].
        keys: K [n, B, H, L, d].
        asked: A [n, B, H, L, d], which takes off what the matrix answers already.
        values: V [n, B, H, L, d].
        targets: the matrix that each segment is written to.
    """
    parts = (tensor.flatten(1, 2) for tensor in (start, keys, asked, values))
    found, last, written = _DeltaRule.apply(*parts, None, tuple(targets), False)
    return found.unflatten(1, start.shape[1:3]), last.view(start.shape), written.view(values.shape)


class _RunningSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, start: Tensor, steps: Tensor, targets: tuple[int, ...], is_back: bool
    ) -> tuple[Tensor, Tensor]:
        found, sums = torch.empty_like(steps), list(start.unbind(0))
        for target, found_now, step in _in_turn(zip(targets, found.unbind(0), steps.unbind(0), strict=True), is_back):
            found_now.copy_(sums[target])
            sums[target] = sums[target] + step
        ctx.set_materialize_grads(False)
        ctx.targets, ctx.is_back, ctx.num_sums = targets, is_back, len(start)
        return found, torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor | None, by_last: Tensor | None) -> tuple[Tensor | None, ...]:
        either = by_found if by_last is None else by_last
        if either is None:
            return None, None, None, None
        if by_last is None:
            by_last = either.new_zeros(ctx.num_sums, *either.shape[1:])
        if by_found is None:
            by_found = either.new_zeros(len(ctx.targets), *either.shape[1:])
        by_steps, by_start = _RunningSums.apply(by_last, by_found, ctx.targets, not ctx.is_back)
        return by_start, by_steps, None, None


class _DeltaRule(torch.autograd.Function):
    """On the way back keys and what is asked change places, and the gradients by what was found are added on the way.

    Texts and heads are one axis.
    """

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        keys: Tensor,
        asked: Tensor,
        values: Tensor | None,
        added: Tensor | None,
        targets: tuple[int, ...],
        is_back: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found, matrices = keys.new_empty(len(keys), *start.shape[1:]), list(start.unbind(0))
        written = torch.empty_like(keys)
        parts = (tensor.unbind(0) for tensor in (found, written, asked, keys))
        given = ([None] * len(keys) if tensor is None else tensor.unbind(0) for tensor in (values, added))
        for target, found_now, written_now, asked_now, keys_now, values_now, step in _in_turn(
            zip(targets, *parts, *given, strict=True), is_back
        ):
            matrix = matrices[target]
            found_now.copy_(matrix)
            if values_now is None:
                torch.bmm(asked_now, matrix, out=written_now)
            else:
                torch.baddbmm(values_now, asked_now, matrix, out=written_now)
            matrices[target] = torch.baddbmm(matrix if step is None else matrix + step, keys_now.mT, written_now)
        ctx.save_for_backward(keys, asked, found, written)
        ctx.set_materialize_grads(False)
        ctx.targets, ctx.is_back, ctx.num_matrices = targets, is_back, len(start)
        return found, torch.stack(matrices), written

    @staticmethod
    def backward(
        ctx: Any, by_found: Tensor | None, by_last: Tensor | None, by_written: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        keys, asked, found, written = ctx.saved_tensors
        if by_last is None:
            by_last = found.new_zeros(ctx.num_matrices, *found.shape[1:])
        by_left, by_start, by_values = _DeltaRule.apply(
            by_last, asked, keys, by_written, by_found, ctx.targets, not ctx.is_back
        )
        gradients = by_start, written @ by_left.mT, by_values @ found.mT, by_values, by_left
        wanted = (
            gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return *wanted, None, None


def _in_turn(parts: Iterable[Any], is_back: bool) -> list[Any]:
    ordered = list(parts)
    return ordered[::-1] if is_back else ordered
