"""Text cut into segments by its positions, and causal attention inside them.

n: segments side by side. m: queries of a segment that are asked in this call. L: tokens of the segment so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from newllm.layers.memory import Sums, feature_map


def split(tensor: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    """Return parts one after another, all there is; a single one as it is, whose gradient torch would copy.

    Not slices: the gradient of a slice fills a tensor as large as the whole.
    """
    return [tensor] if len(sizes) == 1 else tensor.split(list(sizes), dim=dim)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the parts one after another; a single one as it is, where torch would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


class Tokens(NamedTuple):
    """Projected tokens of a text since the open segment began.

    Attributes:
        keys: [B, H, L, d].
        values: [B, H, L, d].
        strengths: how much of its value a token writes, 0 to 1 [B, H, L, 1]; of size 0 where the kernel has none.
    """

    keys: Tensor
    values: Tensor
    strengths: Tensor

    def last(self, length: int) -> Tokens:
        """Return the last tokens, in the given number."""
        return Tokens(*(tensor[:, :, tensor.shape[2] - length :] for tensor in self))


class Segments(NamedTuple):
    """Equally long segments side by side.

    Attributes:
        queries: [n, B, H, m, d], the last ones of each segment.
        keys: [n, B, H, L, d].
        values: [n, B, H, L, d].
        strengths: [n, B, H, L, 1], or of size 0.
        query_features: queries after the feature map.
        key_features: keys after the feature map.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    strengths: Tensor
    query_features: Tensor
    key_features: Tensor

    def first(self) -> Tokens:
        """Return the tokens of the first segment."""
        return Tokens(self.keys[0], self.values[0], self.strengths[0])


def cut(
    projected_BT3Hd: Tensor, strengths_BTH1: Tensor, open_tokens: Tokens, segment_length: int, *, at_once: int
) -> Iterator[Segments]:
    """Give the segments of a call: what completes the open one, whole ones side by side, and what stays open.

    Args:
        projected_BT3Hd: queries, keys and values of the call's tokens.
        strengths_BTH1: of the same tokens; of size 0 where the kernel has none.
        open_tokens: of the open segment so far.
        segment_length: tokens of a segment.
        at_once: whole segments that stand side by side, at most.
    """
    past, rest = open_tokens.keys.shape[2], projected_BT3Hd.shape[1]
    counts = []
    if past > 0 or rest == 0:
        counts.append((1, min(segment_length - past, rest)))
        rest -= counts[0][1]
    for first in range(0, rest // segment_length, at_once):
        counts.append((min(at_once, rest // segment_length - first), segment_length))
    if rest % segment_length > 0:
        counts.append((1, rest % segment_length))
    parts = [split(tensor, [n * length for n, length in counts], dim=1) for tensor in (projected_BT3Hd, strengths_BTH1)]
    for (n, length), projected, own_strengths in zip(counts, *parts, strict=True):
        queries, *tokens = _SideBySide.apply(projected, n)
        tokens.append(own_strengths.unflatten(1, (n, length)).permute(1, 0, 3, 2, 4).contiguous())
        if past > 0:
            tokens = [
                torch.cat([own.unsqueeze(0).to(new.dtype), new], dim=3)
                for own, new in zip(open_tokens, tokens, strict=True)
            ]
            past = 0
        yield _with_features(queries, *tokens)


def one_segment(queries_BHmd: Tensor, tokens: Tokens) -> Segments:
    """Return a single segment, of whose tokens the last m are asked for."""
    return _with_features(*(tensor.unsqueeze(0) for tensor in (queries_BHmd, *tokens)))


def _with_features(queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor) -> Segments:
    return Segments(queries, keys, values, strengths, feature_map(queries), feature_map(keys))


class _SideBySide(torch.autograd.Function):
    """Queries, keys and values of tokens [B, n * L, 3, H, d] as those of segments [n, B, H, L, d].

    Segments first, and contiguous: one of them, and all of them as rows, are then views. Each way is one pass over the numbers.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, num_segments: int) -> tuple[Tensor, ...]:
        length = projected.shape[1] // num_segments
        parts = projected.unflatten(1, (num_segments, length)).permute(3, 1, 0, 4, 2, 5)  # [3, n, B, H, L, d]
        return parts.contiguous().unbind(0)

    @staticmethod
    def backward(ctx: Any, *by_parts: Tensor) -> tuple[Tensor, None]:
        return torch.stack([by_part.permute(1, 0, 3, 2, 4) for by_part in by_parts], dim=3).flatten(1, 2), None


def causal_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products of queries and keys [..., m, L], zeros where a query is earlier than the key.

    Args:
        queries: of the last m of the tokens [..., m, d].
        keys: of all tokens [..., L, d].
    """
    return _CausalScores.apply(queries, keys)


class _CausalScores(torch.autograd.Function):
    """Gradients of both are laid out as they are: autograd's own of a turned factor is turned, and slow to go on with."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        return (queries @ keys.mT).mul_(_visible(queries, keys))

    @staticmethod
    def backward(ctx: Any, by_scores: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = ctx.saved_tensors
        by_scores = by_scores * _visible(queries, keys)
        return by_scores @ keys, by_scores.mT @ queries


def _visible(queries: Tensor, keys: Tensor) -> Tensor:
    """1 where a query sees a key, else 0 [m, L]; to multiply by: tril walks many matrices one by one on a CPU."""
    num_queries, num_keys = queries.shape[-2], keys.shape[-2]
    return keys.new_ones(num_queries, num_keys).tril(num_keys - num_queries)


def linear_attention(segments: Segments) -> Sums:
    """Return linear attention up to each query [n * B, H, m, d]."""
    numerator, denominator, _ = _LinearAttention.apply(segments.query_features, segments.key_features, segments.values)
    return Sums(numerator.flatten(0, 1), denominator.flatten(0, 1))


class _LinearAttention(torch.autograd.Function):
    """With the scores [n, B, H, m, L] as a result of their own: a gradient of a gradient goes through them."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = causal_scores(queries, keys)
        ctx.save_for_backward(queries, keys, values, scores)
        ctx.set_materialize_grads(False)
        return scores @ values, scores.sum(-1, keepdim=True), scores

    @staticmethod
    def backward(
        ctx: Any, by_numerator: Tensor | None, by_denominator: Tensor | None, by_own_scores: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        queries, keys, values, scores = ctx.saved_tensors
        by_values = None
        if by_numerator is None:
            by_scores = torch.zeros_like(scores)
        else:
            by_scores, by_values = by_numerator @ values.mT, scores.mT @ by_numerator
        if by_denominator is not None:
            by_scores = by_scores.add_(by_denominator)
        if by_own_scores is not None:
            by_scores = by_scores.add_(by_own_scores)
        by_scores = by_scores.mul_(_visible(queries, keys))
        return by_scores @ keys, by_scores.mT @ queries, by_values


def softmax_attention(segments: Segments) -> Tensor:
    """Return softmax attention up to each query [n * B, H, m, d]."""
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (segments.queries, segments.keys, segments.values))
    attention, num_queries, num_keys = nn.functional.scaled_dot_product_attention, queries.shape[2], keys.shape[2]
    if num_queries == num_keys:
        return attention(queries, keys, values, is_causal=True)
    is_visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=keys.device)
    return attention(queries, keys, values, attn_mask=is_visible.tril(num_keys - num_queries))


def as_tokens(rows_RHmd: Tensor, num_segments: int) -> Tensor:
    """Return rows of segments as texts again, heads inside of tokens [B, n * m, H, d]."""
    return rows_RHmd.unflatten(0, (num_segments, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
