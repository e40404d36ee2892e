"""Text cut into segments by its positions, and causal attention inside them.

n: segments side by side. m: queries of a segment that are asked in this call. L: tokens of the segment so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from newllm.layers.memory import feature_map


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

    def then(self, others: Tokens) -> Tokens:
        """Return these tokens with others after them, in the others' dtype."""
        if self.keys.shape[2] == 0:
            return others
        pairs = zip(self, others, strict=True)
        return Tokens(*(torch.cat([own.to(other.dtype), other], dim=2) for own, other in pairs))


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


def cut(queries_BHTd: Tensor, tokens: Tokens, segment_length: int, *, at_once: int) -> Iterator[Segments]:
    """Give the segments of a call: what completes the open one, whole ones side by side, and what stays open.

    Args:
        queries_BHTd: queries of the call, the last T of the tokens.
        tokens: tokens since the open segment began.
        segment_length: tokens of a segment.
        at_once: whole segments that stand side by side, at most.
    """
    total, num_queries = tokens.keys.shape[2], queries_BHTd.shape[2]
    counts, past = [], total - num_queries
    if past > 0 or num_queries == 0:
        counts.append((1, min(segment_length, total), min(segment_length, total) - past))
        total -= counts[0][1]
    for first in range(0, total // segment_length, at_once):
        counts.append((min(at_once, total // segment_length - first), segment_length, segment_length))
    if total % segment_length > 0:
        counts.append((1, total % segment_length, total % segment_length))
    # split, not slices: the gradient of a slice fills a tensor as long as the text.
    queries = queries_BHTd.split([n * m for n, _, m in counts], dim=2)
    parts = [tensor.split([n * length for n, length, _ in counts], dim=2) for tensor in tokens]
    for (n, _, _), own_queries, *own_tokens in zip(counts, queries, *parts, strict=True):
        yield side_by_side(own_queries, Tokens(*own_tokens), n)


def side_by_side(queries_BHTd: Tensor, tokens: Tokens, num_segments: int) -> Segments:
    """Return tokens of whole segments with the segments on an axis of their own."""
    # Segments first, and contiguous: one of them, and all of them as rows, are then views of it, and so are their gradients.
    queries, keys, values, strengths = (
        tensor.unflatten(2, (num_segments, tensor.shape[2] // num_segments)).permute(2, 0, 1, 3, 4).contiguous()
        for tensor in (queries_BHTd, *tokens)
    )
    return Segments(queries, keys, values, strengths, feature_map(queries), feature_map(keys))


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


def linear_attention(segments: Segments) -> tuple[Tensor, Tensor]:
    """Return numerator [n * B, H, m, d] and denominator [n * B, H, m, 1] of linear attention up to each query."""
    scores = causal_scores(segments.query_features, segments.key_features)  # [n, B, H, m, L]
    return (scores @ segments.values).flatten(0, 1), scores.sum(-1, keepdim=True).flatten(0, 1)


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
