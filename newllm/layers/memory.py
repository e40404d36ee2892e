"""Compressive memory as a value: associations kept as matrices of a fixed size, in banks that are written in turn.

N: memory banks of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from newllm.state import State

WriteRule = Literal["linear", "delta"]


class Bank(NamedTuple):
    """One memory, all of it sums over the tokens written; a kernel leaves out what it does not use (size 0).

    Attributes:
        matrix: associations, key x value [B, H, d, d].
        norm: sum of the keys' features [B, H, d]; zero while nothing was written.
        value_sum: sum of the values [B, H, d].
        tokens: how many were written [B, 1].
        gram: sum of products of key features [B, H, d, d].
    """

    matrix: Tensor
    norm: Tensor
    value_sum: Tensor
    tokens: Tensor
    gram: Tensor

    def one_by_one(self) -> list[Bank]:
        """Return what stands side by side on an axis before all others, [n, ...], one by one."""
        return [Bank(*tensors) for tensors in zip(*(tensor.unbind(0) for tensor in self), strict=True)]


@dataclass(frozen=True)
class LinearMemory(State):
    """The banks of a layer, every tensor of `Bank` with the banks on axis 1, and the rule that wrote them."""

    matrix: Tensor
    norm: Tensor
    value_sum: Tensor
    tokens: Tensor
    gram: Tensor
    rule: WriteRule = field(metadata={"shared": True})

    def is_empty(self) -> Tensor:
        """Return True for banks never written, [B, N]."""
        return self.norm.sum(dim=(2, 3)) == 0

    def banks(self) -> list[Bank]:
        """Return the banks one by one."""
        return self.by_bank().one_by_one()

    def by_bank(self) -> Bank:
        """Return the sums of all banks, banks first [N, B, ...]."""
        return Bank(*(tensor.transpose(0, 1) for tensor in self._sums()))

    def with_banks(self, banks: Sequence[Bank]) -> LinearMemory:
        """Return the memory with all banks replaced."""
        matrix, norm, value_sum, tokens, gram = (torch.stack(tensors, dim=1) for tensors in zip(*banks, strict=True))
        return LinearMemory(matrix, norm, value_sum, tokens, gram, self.rule)

    def where(self, is_kept_N: Sequence[bool], other: LinearMemory) -> LinearMemory:
        """Return this memory's banks where `is_kept_N` is True, the other's elsewhere."""
        pairs = zip(is_kept_N, self.banks(), other.banks(), strict=True)
        return self.with_banks([own if is_kept else others for is_kept, own, others in pairs])

    def _sums(self) -> tuple[Tensor, ...]:
        return self.matrix, self.norm, self.value_sum, self.tokens, self.gram


def feature_map(tensor: Tensor) -> Tensor:
    """Return ELU + 1 elementwise: positive, so that a normaliser of sums never vanishes once something is written.

    Source: Linear Transformers (Katharopoulos et al., 2020), section 3.2.
    """
    return _FeatureMap.apply(tensor)


class _FeatureMap(torch.autograd.Function):
    """exp(x) below 0, x + 1 from there on; its gradient, 1 or the feature itself, needs no exponential.

    `nn.functional.elu` takes several times as long, and more than ten times for a gradient whose axes are turned, as those of keys are.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        features = tensor.clamp(max=0).exp_().add_(tensor.clamp(min=0))
        ctx.save_for_backward(features)
        return features

    @staticmethod
    def backward(ctx: Any, by_features: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return by_features * features.clamp(max=1)


def dots(rows: Tensor, vectors: Tensor) -> Tensor:
    """Return the products of rows [..., L, d] with a few vectors [..., k, d], as [..., L, k]."""
    return _Dots.apply(rows, vectors)


class _Dots(torch.autograd.Function):
    """As one product with the vectors at the left: on CPUs several times as fast as with them at the right, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(rows, vectors)
        return (vectors @ rows.mT).mT

    @staticmethod
    def backward(ctx: Any, by_dots: Tensor) -> tuple[Tensor, Tensor]:
        rows, vectors = ctx.saved_tensors
        by_rows = by_dots * vectors if vectors.shape[-2] == 1 else by_dots @ vectors
        return by_rows, by_dots.mT @ rows


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator where the denominator is not 0, the numerator where it is: 0 for sums over nothing."""
    # By the reciprocal: the gradient of a division goes over the numerator, which is often the larger, several times.
    return numerator * (denominator + (denominator == 0)).reciprocal()


class Sums(NamedTuple):
    """What is answered to queries, with its division still to come: the shares it is weighed by can be divided instead.

    Attributes:
        numerator: [..., m, d].
        denominator: [..., m, 1]; None where the numerator is the answer.
    """

    numerator: Tensor
    denominator: Tensor | None

    def answers(self) -> Tensor:
        """Return the quotient [..., m, d]; zeros for sums over nothing."""
        return self.numerator if self.denominator is None else divide(self.numerator, self.denominator)

    def joined(self, other: Sums) -> tuple[Tensor, Tensor]:
        """Return the answers of both by one denominator, [..., m, d], and how much of that is this one's [..., m, 1]."""
        assert self.denominator is not None, "answers without a denominator cannot be joined"
        assert other.denominator is not None, "answers without a denominator cannot be joined"
        denominator = self.denominator + other.denominator
        return divide(self.numerator + other.numerator, denominator), divide(self.denominator, denominator)

    def shares(self, weights: Tensor) -> Tensor:
        """Return what to multiply the numerator by, for the answers times weights [..., m or 1, 1]."""
        return weights if self.denominator is None else divide(weights, self.denominator)


def merge(memories: Sequence[LinearMemory]) -> LinearMemory:
    """Return the memory of one reader of all the texts: memories are sums over tokens, and add up bank by bank.

    Args:
        memories: of equal layers and batch sizes.
    Raises:
        ValueError: nothing to merge, a memory that the delta rule wrote, or memories of different shapes.
    """
    if not memories:
        raise ValueError("merge: was given no memories. Allowed: one or more. Give the memories to add.")
    if any(memory.rule == "delta" for memory in memories):
        raise ValueError(
            "merge: a memory was written by the delta rule, where what is written depends on what was there. "
            "Allowed: memories of write=linear. Let one reader read both texts."
        )
    first = memories[0]
    for memory in memories[1:]:
        for name, own, other in zip(Bank._fields, first._sums(), memory._sums(), strict=True):
            if own.shape != other.shape:
                raise ValueError(
                    f"merge: {name} has shapes {list(own.shape)} and {list(other.shape)}. Allowed: memories of one layer. "
                    "Merge memories of the same model and batch size."
                )
    sums = zip(*(memory._sums() for memory in memories), strict=True)
    matrix, norm, value_sum, tokens, gram = (reduce(torch.add, tensors) for tensors in sums)
    return LinearMemory(matrix, norm, value_sum, tokens, gram, first.rule)
