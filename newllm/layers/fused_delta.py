"""The token delta rule over whole segments by the CUDA kernel of flash-linear-attention, where its gradients are ours.

The package multiplies in bf16, so it is for training in mixed precision. Before 0.5.2 its gradients by keys and strengths are wrong on
some GPUs and Triton versions (https://github.com/fla-org/flash-linear-attention/issues/984): it is compared before it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Rule = Callable[..., tuple[Tensor, Tensor]]

# Relative difference, in the norm of a tensor, that bf16 products explain: right kernels stay below half of it, the known wrong
# ones are off by half of the tensor.
TOLERANCE = 0.03
LENGTH = 160  # tokens to compare over: two chunks of the kernel and a half
NAMES = ("answers", "memory", "by queries", "by keys", "by values", "by strengths", "by memory")


class NotUsableError(Exception):
    """The package is there and cannot be used; the text says why."""


def installed() -> Rule | None:
    """Return the package's kernel, None where the package is not there.

    Raises:
        NotUsableError: it does not fit the Triton that is installed, or lacks a package of its own.
    """
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        return importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    except Exception as error:  # decorators of kernels end with anything
        raise NotUsableError(_ends_with(error)) from error


def pass_over(
    rule: Rule, queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a memory answers while it is written token by token [B, H, T, d], and what it holds then [B, H, d, d].

    Args:
        rule: the kernel.
        queries: unit vectors [B, H, T, d].
        keys: unit vectors [B, H, T, d].
        values: [B, H, T, d].
        strengths: 0 to 1, [B, H, T, 1].
        matrix: what the memory holds before.
    """
    given = (tensor.transpose(1, 2).to(torch.bfloat16) for tensor in (queries, keys, values, strengths))
    q, k, v, beta = (tensor.contiguous() for tensor in given)  # [B, H, T, d] -> [B, T, H, d]
    answers, after = rule(
        q, k, v, beta.squeeze(-1), scale=1.0, initial_state=matrix.float().contiguous(), output_final_state=True
    )
    return answers.transpose(1, 2).to(values.dtype), after.to(matrix.dtype)


def problem_with(
    rule: Rule, reference: Rule, *, num_heads: int, head_dim: int, device: torch.device | str
) -> str | None:
    """Return why a kernel must not be used, None if answers, memory and all gradients are those of the reference.

    Args:
        rule: the kernel.
        reference: (queries, keys, values, strengths, matrix) -> answers and memory, as `pass_over` gives them.
        num_heads: of the layer.
        head_dim: of the layer.
        device: where the kernel is to run.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, num_heads, *shape, generator=generator).to(device)

    inputs = [drawn(LENGTH, head_dim), drawn(LENGTH, head_dim), drawn(LENGTH, head_dim), drawn(LENGTH, 1).sigmoid()]
    inputs.append(drawn(head_dim, head_dim) / head_dim**0.5)
    weights = drawn(LENGTH, head_dim), drawn(head_dim, head_dim)

    def everything(call: Rule) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        q, k, *others = leaves
        results = call(normalize(q, dim=-1), normalize(k, dim=-1), *others)
        total = sum((weight * result).sum() for weight, result in zip(weights, results, strict=True))
        return [*(result.detach() for result in results), *torch.autograd.grad(total, leaves)]  # type: ignore[arg-type]

    try:
        found = everything(lambda *given: pass_over(rule, *given))
    except Exception as error:
        # A package's own limits and its compiler's failures come as anything.
        return _ends_with(error)
    pairs = zip(NAMES, found, everything(reference), strict=True)
    differences = {name: ((own - true).norm() / true.norm()).item() for name, own, true in pairs}
    # Not `> TOLERANCE`: a NaN is wrong too.
    wrong = [f"{name} {difference:.1%}" for name, difference in differences.items() if not difference <= TOLERANCE]
    return f"it differs from this package's own form, {', '.join(wrong)}" if wrong else None


def _ends_with(error: Exception) -> str:
    return f"it ends with {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
