"""Linear maps, on some processors with products that are twice as fast.

MKL, which torch multiplies fp32 matrices with, uses AVX-512 on Intel's processors only; oneDNN, which comes with torch as well, uses it
wherever it is there. On AMD's processors with AVX-512 large products are therefore oneDNN's, in fp32 as before: 1.8 to 2.3 times as fast on
Zen 5; on Zen 4, which takes such an instruction in two halves, 1.1 to 1.3 times, from larger ones on.
`torch.backends.mkldnn.flags(enabled=False)` leaves them to MKL.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from newllm.processor import zen_generation

log = logging.getLogger(__name__)

# Results of a product from which oneDNN is the faster one; below, what it prepares takes longer than it saves.
LEAST_RESULTS = 2**14


class Linear(nn.Linear):
    """`torch.nn.Linear`, the same weights under the same names, by the faster product."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return inputs @ weight.T + bias [..., N], as `torch.nn.functional.linear` does; gradients of any order.

    Args:
        inputs: [..., K].
        weight: [N, K].
        bias: [N], or None.
    """
    if not _pays(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    return _Linear.apply(inputs.reshape(-1, inputs.shape[-1]), weight, bias).view(*inputs.shape[:-1], -1)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Return left.T @ right [N, K], the sum of the outer products of rows; gradients of any order.

    Args:
        left: [M, N].
        right: [M, K].
    """
    if not _pays(left.T, right.T, turned=True):
        return left.T @ right
    # oneDNN is faster with the wider of the two at the right. A wide product is then turned.
    return linear(right.T, left.T).T if left.shape[1] > right.shape[1] else linear(left.T, right.T)


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return left @ right.T + bias [M, N] without a way back for gradients.

    Args:
        left: [M, K].
        right: [N, K].
        bias: [N], or None.
        out: memory that may be taken for the result, [M, N]: oneDNN's has its own, so what counts is what is returned.
    """
    if _pays(left, right):
        return _onednn(left, right, bias)
    return torch.mm(left, right.T, out=out) if bias is None else torch.addmm(bias, left, right.T, out=out)


@cache
def is_onednn_faster() -> bool:
    """Return whether large fp32 products on this machine's processor are left to oneDNN.

    It is compared with torch's own product once; where it is missing or wrong, that is said and nothing is left to it.
    """
    if not (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and zen_generation() >= 4
    ):
        return False
    # The generator is left alone: what is drawn after it must not depend on the processor.
    left, right = torch.linspace(-1, 1, 96 * 160).view(96, 160), torch.linspace(-3, 2, 64 * 160).sin().view(64, 160)
    with torch.inference_mode():
        try:
            torch.testing.assert_close(_onednn(left, right, None), left @ right.T)
        except (AssertionError, AttributeError, RuntimeError) as error:
            log.warning(
                "Large products stay with MKL, oneDNN's cannot be used with torch %s: %s", torch.__version__, error
            )
            return False
    return True


@cache
def least_multiplications(*, turned: bool) -> int:
    """Return from how many multiplications on oneDNN is the faster one, of a product whose factors it has to turn or of another."""
    if zen_generation() == 4:
        return 2**29 if turned else 2**28
    return 2**23


def _pays(left: Tensor, right: Tensor, *, turned: bool = False) -> bool:
    """Whether left @ right.T is for oneDNN: a large product of plain fp32 matrices on such a processor, not traced by a compiler."""
    if torch.compiler.is_compiling() or left.device.type != "cpu":
        return False
    num_rows, width = right.shape
    if width == 0 or left.numel() // width * num_rows < LEAST_RESULTS:
        return False
    if left.numel() * num_rows < least_multiplications(turned=turned):
        return False
    return (
        left.dtype == right.dtype == torch.float32
        and type(right) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and is_onednn_faster()
    )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_laid_out(left), _laid_out(right), bias, "none", [], "")


def _laid_out(matrix: Tensor) -> Tensor:
    """The matrix, copied where it is neither row by row nor column by column: one row in many, say."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _onednn(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_inputs = linear(by_output, weight.T)
        if ctx.needs_input_grad[1]:
            by_weight = outer(by_output, inputs)
        if ctx.needs_input_grad[2]:
            by_bias = by_output.sum(dim=0)
        return by_inputs, by_weight, by_bias
