"""Scans over segments, and the other operations with gradients of their own: values of plain loops, gradients of any order."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from newllm.layers.memory import dots, feature_map
from newllm.layers.scan import delta_rule, running_sums
from newllm.layers.segments import Segments, Tokens, cut, linear_attention

BATCH, HEADS, LENGTH, DIM = 2, 1, 3, 2
turns = st.integers(1, 3).flatmap(
    lambda banks: st.tuples(st.just(banks), st.lists(st.integers(0, banks - 1), min_size=1, max_size=5))
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def sums_in_a_loop(start: Tensor, steps: Tensor, targets: list[int]) -> tuple[Tensor, ...]:
    sums, found = list(start), []
    for target, step in zip(targets, steps, strict=True):
        found.append(sums[target])
        sums[target] = sums[target] + step
    return torch.stack(found), torch.stack(sums)


def delta_in_a_loop(
    start: Tensor, keys: Tensor, asked: Tensor, values: Tensor, targets: list[int]
) -> tuple[Tensor, ...]:
    matrices, found, written = list(start), [], []
    for target, k, a, v in zip(targets, keys, asked, values, strict=True):
        found.append(matrices[target])
        written.append(v + a @ matrices[target])
        matrices[target] = matrices[target] + k.mT @ written[-1]
    return torch.stack(found), torch.stack(matrices), torch.stack(written)


def scans(num_banks: int, targets: list[int]) -> list[tuple[Callable, Callable, list[Tensor]]]:
    steps, matrices = len(targets), (BATCH, HEADS, DIM, DIM)
    tokens = [drawn(steps, BATCH, HEADS, LENGTH, DIM) for _ in range(3)]
    return [
        (running_sums, sums_in_a_loop, [drawn(num_banks, BATCH, DIM), drawn(steps, BATCH, DIM)]),
        (delta_rule, delta_in_a_loop, [drawn(num_banks, *matrices), *tokens]),
    ]


@settings(max_examples=20, deadline=None)
@given(turns)
def test_scans_are_their_loops_with_gradients_of_any_part(turn: tuple[int, list[int]]) -> None:
    for scan, loop, inputs in scans(*turn):
        results, expected = scan(*inputs, turn[1]), loop(*inputs, turn[1])
        torch.testing.assert_close(results, expected)
        # By each result alone: what a loss does not use has no gradient.
        for result, plain in zip(results, expected, strict=True):
            by_result = torch.randn_like(result)
            ours = torch.autograd.grad(result, inputs, by_result, retain_graph=True, allow_unused=True)
            theirs = torch.autograd.grad(plain, inputs, by_result, retain_graph=True, allow_unused=True)
            for own, other, tensor in zip(ours, theirs, inputs, strict=True):
                nothing = torch.zeros_like(tensor)
                torch.testing.assert_close(nothing if own is None else own, nothing if other is None else other)


@pytest.mark.parametrize("targets", [[0, 0, 0], [0, 1, 0, 1], [1, 1, 0]])
def test_scans_have_gradients_of_gradients(targets: list[int]) -> None:
    for scan, _, inputs in scans(2, targets):
        assert gradcheck(lambda *given, scan=scan: scan(*given, targets), inputs)
        assert gradgradcheck(lambda *given, scan=scan: scan(*given, targets), inputs)


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_dots_are_products(num_vectors: int) -> None:
    rows, vectors = drawn(BATCH, LENGTH, DIM), drawn(BATCH, num_vectors, DIM)

    torch.testing.assert_close(dots(rows, vectors), rows @ vectors.mT)
    assert gradcheck(dots, (rows, vectors))
    assert gradgradcheck(dots, (rows, vectors))


@pytest.mark.parametrize("num_queries", [1, LENGTH])
def test_linear_attention_sums_over_what_a_query_sees(num_queries: int) -> None:
    queries = drawn(1, BATCH, HEADS, num_queries, DIM)
    keys, values = drawn(1, BATCH, HEADS, LENGTH, DIM), drawn(1, BATCH, HEADS, LENGTH, DIM)

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        features = feature_map(queries), feature_map(keys)
        return tuple(linear_attention(Segments(queries, keys, values, keys[..., :0], *features)))

    numerator, denominator = attention(queries, keys, values)
    for index in range(num_queries):
        seen = LENGTH - num_queries + index + 1
        weights = feature_map(queries)[..., index : index + 1, :] @ feature_map(keys)[..., :seen, :].mT
        torch.testing.assert_close(numerator[..., index, :], (weights @ values[..., :seen, :])[0, ..., 0, :])
        torch.testing.assert_close(denominator[..., index, 0], weights.sum(-1)[0, ..., 0])
    assert gradcheck(attention, (queries, keys, values))
    assert gradgradcheck(attention, (queries, keys, values))
    # By one of both alone: the other then has no gradient.
    assert gradcheck(lambda *given: attention(*given)[0], (queries, keys, values))
    assert gradcheck(lambda *given: attention(*given, values.detach())[1], (queries, keys))


@settings(max_examples=30, deadline=None)
@given(past=st.integers(0, 3), new=st.integers(0, 14), at_once=st.integers(1, 3))
def test_segments_hold_every_token_once_in_its_place(past: int, new: int, at_once: int) -> None:
    projected, strengths = drawn(BATCH, new, 3, HEADS, DIM), drawn(BATCH, new, HEADS, 1)
    open_tokens = Tokens(*(drawn(BATCH, HEADS, past, size) for size in (DIM, DIM, 1)))

    found = list(cut(projected, strengths, open_tokens, 4, at_once=at_once))

    queries = torch.cat([part.queries.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in found], dim=2)
    torch.testing.assert_close(queries, projected[:, :, 0].transpose(1, 2))
    tokens = projected[:, :, 1].transpose(1, 2), projected[:, :, 2].transpose(1, 2), strengths.transpose(1, 2)
    for name, own, others in zip(Tokens._fields, open_tokens, tokens, strict=True):
        joined = torch.cat([getattr(part, name).permute(1, 2, 0, 3, 4).flatten(2, 3) for part in found], dim=2)
        torch.testing.assert_close(joined, torch.cat([own, others], dim=2))
    assert all(len(part.keys) <= at_once for part in found)
    assert all(part.keys.shape[3] == 4 for part in found[:-1])


def test_tokens_side_by_side_have_gradients_of_gradients() -> None:
    projected, strengths = drawn(BATCH, 2 * LENGTH, 3, HEADS, DIM), drawn(BATCH, 2 * LENGTH, HEADS, 1)
    none = drawn(BATCH, HEADS, 0, DIM)

    def parts(projected: Tensor) -> tuple[Tensor, ...]:
        (segments,) = cut(projected, strengths, Tokens(none, none, none[..., :1]), LENGTH, at_once=2)
        return segments.queries, segments.keys, segments.values

    assert gradcheck(parts, projected)
    assert gradgradcheck(parts, projected)
