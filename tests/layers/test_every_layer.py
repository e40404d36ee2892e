"""What holds for every layer and every option of it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import MEMORY_OPTIONS, OPTIONS, SEGMENT, build, empty, in_calls, texts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.state import tensors_of


def solve_flops(matrix, sides, *_, out_shape=None, **__):
    """LU factors, then every right side forward and back."""
    *batch, size = matrix[:-1]
    return math.prod(batch) * (2 / 3 * size**3 + 2 * size**2 * sides[-1])


def triangular_flops(matrix, sides, *_, out_shape=None, **__):
    return matrix[-1] * math.prod(sides)


# The counter knows products only.
SOLVES = {
    torch.ops.aten._linalg_solve_ex: solve_flops,
    torch.ops.aten.linalg_solve_triangular: triangular_flops,
}
# fp32 sums of some tens of terms, in another order.
TOLERANCE = 1e-5


def assert_states_equal(one, other, tolerance=TOLERANCE):
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(tensors_of(other)[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("call_length", [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 1])
def test_calls_of_any_length_equal_one_pass(name, call_length):
    layer, length = build(name), 4 * SEGMENT + 3
    hidden = texts(2, length)

    whole, last = in_calls(layer, hidden, [length])
    parts = [call_length] * (length // call_length) + [length % call_length] * (length % call_length > 0)
    cut, last_of_cut = in_calls(layer, hidden, parts)

    torch.testing.assert_close(cut, whole, atol=TOLERANCE, rtol=TOLERANCE)
    assert_states_equal(last, last_of_cut)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 2 * SEGMENT + 1), min_size=1, max_size=6))
def test_random_calls_equal_one_pass(name, lengths):
    layer = build(name)
    hidden = texts(1, sum(lengths))

    torch.testing.assert_close(
        in_calls(layer, hidden, lengths)[0],
        in_calls(layer, hidden, [sum(lengths)])[0],
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_later_tokens_do_not_change_earlier_outputs(name):
    layer = build(name)
    _, state = in_calls(layer, texts(1, 2 * SEGMENT + 1), [2 * SEGMENT + 1])
    hidden = texts(1, 2 * SEGMENT + 3, seed=1)
    for position in range(1, hidden.shape[1]):
        other = torch.cat([hidden[:, :position], texts(1, hidden.shape[1] - position, seed=2)], dim=1)

        before, _ = layer(hidden, state)
        after, _ = layer(other, state)

        torch.testing.assert_close(after[:, :position], before[:, :position], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", OPTIONS)
def test_row_reset_inside_a_segment_reads_as_a_fresh_text(name):
    layer = build(name)
    first, second = texts(3, SEGMENT + 2), texts(3, 2 * SEGMENT + 3, seed=1)
    _, state = layer(first, empty(layer, 3))

    outputs, last = layer(second, state.reset([False, True, False]))

    fresh, last_of_fresh = layer(second[1:2], empty(layer, 1))
    kept, last_of_kept = layer(second[[0, 2]], state.select([0, 2]))
    torch.testing.assert_close(outputs[1:2], fresh, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(outputs[[0, 2]], kept, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(layer(first, last)[0][1:2], layer(first[1:2], last_of_fresh)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        layer(first, last)[0][[0, 2]], layer(first[[0, 2]], last_of_kept)[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_a_batch_are_independent(name):
    layer, hidden = build(name), texts(3, 2 * SEGMENT + 1)
    _, state = layer(texts(3, SEGMENT + 1, seed=1), empty(layer, 3))

    together, _ = layer(hidden, state)

    for row in range(3):
        alone, _ = layer(hidden[row : row + 1], state.select([row]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_leaves_the_state_it_was_given(name):
    layer = build(name)
    _, state = layer(texts(2, SEGMENT + 1), empty(layer, 2))
    before = {key: tensor.clone() for key, tensor in tensors_of(state).items()}

    layer(texts(2, 2 * SEGMENT, seed=1), state)

    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(state).items())


@pytest.mark.parametrize("name", OPTIONS)
def test_float64_runs_throughout(name):
    layer = build(name).double()
    hidden = texts(1, 2 * SEGMENT + 1, dtype=torch.float64)

    output, state = in_calls(layer, hidden, [SEGMENT + 1, SEGMENT])
    whole, _ = in_calls(layer, hidden, [2 * SEGMENT + 1])

    assert output.dtype == torch.float64
    assert all(t.dtype in (torch.float64, torch.int64) for t in tensors_of(state).values())
    # float64: any loss to fp32 on the way would show at 1e-7.
    torch.testing.assert_close(output, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [SEGMENT - 1, SEGMENT, 3 * SEGMENT + 1])
def test_state_bytes_count_the_real_tensors(name, length):
    layer = build(name)

    _, state = layer(texts(2, length), empty(layer, 2))

    assert state.nbytes == 2 * layer.state_bytes(length)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [SEGMENT - 1, 2 * SEGMENT, 3 * SEGMENT + 1])
def test_flops_per_token_count_the_real_products(name, length):
    layer = build(name)

    # The counter knows no fused attention on CPU; the plain path multiplies the same matrices.
    with (
        FlopCounterMode(display=False, custom_mapping=SOLVES) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        layer(texts(2, length), empty(layer, 2))

    assert counter.get_total_flops() == pytest.approx(2 * length * layer.flops_per_token(length))


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_gradient_flows_through_the_memory_inside_a_block(name):
    layer = build(name)
    hidden = texts(1, 3 * SEGMENT).requires_grad_()

    output, _ = layer(hidden, empty(layer, 1))
    output[:, 2 * SEGMENT :].sum().backward()

    assert hidden.grad[:, :SEGMENT].abs().sum() > 0
    assert torch.isfinite(hidden.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_detach_every_cuts_the_gradient_after_that_many_segments(name):
    layer = build(name, detach_every=2)
    hidden = texts(1, 4 * SEGMENT).requires_grad_()

    output, _ = layer(hidden, empty(layer, 1))
    (gradient,) = torch.autograd.grad(output[:, 3 * SEGMENT :].sum(), hidden)

    assert gradient[:, : 2 * SEGMENT].abs().sum() == 0
    assert gradient[:, 2 * SEGMENT : 3 * SEGMENT].abs().sum() > 0


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_detach_every_leaves_the_gradient_alone_while_a_segment_is_open(name):
    layer = build(name, detach_every=1)
    before = layer(texts(1, SEGMENT), empty(layer, 1))[1].detach()
    memory = dataclasses.replace(before.memory, matrix=before.memory.matrix.clone().requires_grad_())

    _, after = layer(texts(1, SEGMENT - 1), dataclasses.replace(before, memory=memory))

    assert after.memory.matrix.requires_grad


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_bf16_autocast_keeps_sums_in_fp32(name):
    layer = build(name)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = layer(texts(1, 2 * SEGMENT + 1), empty(layer, 1))

    memory = tensors_of(state)
    assert memory["memory.matrix"].dtype == memory["memory.norm"].dtype == torch.float32
    _, exact = layer(texts(1, 2 * SEGMENT + 1), empty(layer, 1))
    # bf16 keeps 8 bits: features differ by 1/128 or so, their fp32 sums no more than that.
    torch.testing.assert_close(memory["memory.norm"], tensors_of(exact)["memory.norm"], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_bf16_weights_keep_sums_in_fp32(name):
    layer = build(name).to(torch.bfloat16)
    hidden = texts(1, 2 * SEGMENT + 1).to(torch.bfloat16)

    output, state = in_calls(layer, hidden, [SEGMENT + 1, SEGMENT])

    assert output.dtype == torch.bfloat16
    assert state.memory.matrix.dtype == state.memory.norm.dtype == torch.float32


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_the_state_keeps_no_more_than_it_says(name):
    layer = build(name)

    _, state = layer(texts(1, 5 * SEGMENT + 1), empty(layer, 1))

    # A view of the call's keys would hold all of them.
    assert (
        sum(t.untyped_storage().nbytes() for t in tensors_of(state).values() if t.is_floating_point()) == state.nbytes
    )


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_reading_without_update_leaves_the_memory(name):
    layer = build(name)
    _, state = layer(texts(2, 2 * SEGMENT), empty(layer, 2))

    _, after = layer(texts(2, 3 * SEGMENT, seed=1), state, update_memory=False)

    assert torch.equal(after.memory.matrix, state.memory.matrix)
    assert torch.equal(after.memory.norm, state.memory.norm)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_depends_on_every_parameter(name):
    layer = build(name)
    _, state = layer(texts(1, 4 * SEGMENT), empty(layer, 1))

    layer(texts(1, 2 * SEGMENT + 1, seed=1), state)[0].square().sum().backward()

    unused = [key for key, p in layer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert unused == []
