"""What holds of every model of contexts: one recurrence however it is run, costs as they are counted, a state that is a value."""

import pytest
import torch
from small_context import MODELS, VOCABULARY, in_calls, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.recurrence import solve
from newllm.trainers.lag import sweep_map

# fp32 sums of some tens of terms, in another order.
TOLERANCE = 1e-5


@pytest.fixture(params=sorted(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_calls_of_any_length_equal_one_pass(model, length):
    input_ids = tokens(2, 7)

    whole = model(input_ids)
    cut, state = in_calls(model, input_ids, length)

    torch.testing.assert_close(cut, whole.logits, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(state.hidden, whole.state.hidden, atol=TOLERANCE, rtol=TOLERANCE)
    assert state.positions == (7, 7)


def test_as_many_sweeps_as_positions_equal_the_exact_pass(model):
    model, input_ids = model.double(), tokens(2, 7)
    noise = torch.randn(2, 7, model.dim, dtype=torch.float64)

    swept = solve(sweep_map(model, input_ids), noise, sweeps=7).states

    exact = model(input_ids)
    torch.testing.assert_close(swept, exact.hidden, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(model.logits(swept), exact.logits, atol=1e-11, rtol=1e-11)


def test_as_many_differentiated_sweeps_as_positions_give_the_gradient_through_time(model):
    model, input_ids = model.double(), tokens(2, 5)
    parameters = list(model.parameters())

    exact = torch.autograd.grad(model(input_ids).logits.square().sum(), parameters)
    start = torch.randn(2, 5, model.dim, dtype=torch.float64)
    states = solve(sweep_map(model, input_ids), start, sweeps=5, differentiate=5).states
    swept = torch.autograd.grad(model.logits(states).square().sum(), parameters)

    for one, other in zip(exact, swept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_token_changes_nothing_before_it_but_its_own_and_the_next_position(model):
    input_ids = tokens(1, 6)
    before = model(input_ids).logits
    for position in range(1, 6):
        changed = input_ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY

        after = model(changed).logits

        assert torch.equal(after[:, :position], before[:, :position])
        assert (after - before)[:, position : position + 2].abs().amax(-1).min() > 1e-5


def test_only_the_context_is_read_from_the_position_before(model):
    input_ids, previous = tokens(2, 5), torch.randn(2, 5, model.dim)
    unread = torch.randn(2, 5, model.dim - model.context_dim)
    other = torch.cat([previous[..., : model.context_dim], unread], dim=-1)

    assert torch.equal(
        model(input_ids, previous_hidden=previous).hidden, model(input_ids, previous_hidden=other).hidden
    )


def test_without_feedback_what_came_before_is_read_as_no_context(model):
    input_ids, previous = tokens(2, 5), torch.randn(2, 5, model.dim)
    start = model.initial_state(2)

    hidden = model.encode(input_ids, start, previous_hidden=previous, use_feedback=False).hidden

    expected = model.encode(input_ids, start, previous_hidden=torch.zeros_like(previous)).hidden
    assert torch.equal(hidden, expected)


def test_a_row_reset_where_a_text_begins_equals_a_new_text(model):
    state = model(tokens(2, 5)).state.reset(torch.tensor([False, True]))
    second = tokens(2, 4)

    mixed = model(second, state).logits

    torch.testing.assert_close(mixed[1], model(second[1:]).logits[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(mixed[0], model(second[:1]).logits[0], atol=1e-3)


def test_a_saved_state_continues_as_the_kept_one(model, tmp_path):
    state = model(tokens(2, 5)).state
    state.save(tmp_path / "state.safetensors")

    loaded = model.initial_state(2).load(tmp_path / "state.safetensors")

    assert torch.equal(model(tokens(2, 3), loaded).logits, model(tokens(2, 3), state).logits)


def test_flops_are_those_of_one_sweep(model):
    input_ids = tokens(2, 5)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids, previous_hidden=torch.zeros(2, 5, model.dim))

    assert counter.get_total_flops() == 10 * model.flops_per_token(5)


def test_state_bytes_are_those_of_the_tensors(model):
    assert model(tokens(2, 5)).state.nbytes == 2 * model.state_bytes(5)
