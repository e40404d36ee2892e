"""The context model: one recurrence however it is run, layers as defined, the published counts."""

import pytest
import torch
from small_context import VOCABULARY, context_config, context_model, in_calls, tokens
from torch.utils.flop_counter import FlopCounterMode

from newllm.layers.context_block import ContextLayer, TokenBlock, TokenLayer, context_sources
from newllm.models.base import count_parameters
from newllm.models.context import ContextLM
from newllm.models.context_state import token_window
from newllm.recurrence import solve
from newllm.trainers.lag import sweep_map

EVERY = [
    *({"plan": plan} for plan in "AEFG"),
    {"num_input_tokens": 3},
    {"num_input_tokens": 2, "plan": "G", "ffn_layers": 2},
    {"weight_tying": False},
    {"num_layers": 1},
]
IDS = ["-".join(f"{key}={value}" for key, value in options.items()) for options in EVERY]
# fp32 sums of some tens of terms, in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("options", EVERY, ids=IDS)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_calls_of_any_length_equal_one_pass(options, length):
    model, input_ids = context_model(**options), tokens(2, 7)

    whole = model(input_ids)
    cut, state = in_calls(model, input_ids, length)

    torch.testing.assert_close(cut, whole.logits, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(state.context, whole.state.context, atol=TOLERANCE, rtol=TOLERANCE)
    assert state.positions == (7, 7)


@pytest.mark.parametrize("options", EVERY, ids=IDS)
def test_as_many_sweeps_as_positions_equal_the_exact_pass(options):
    model, input_ids = context_model(**options).double(), tokens(2, 7)
    noise = torch.randn(2, 7, model.dim, dtype=torch.float64)

    swept = solve(sweep_map(model, input_ids), noise, sweeps=7).states

    exact = model(input_ids)
    torch.testing.assert_close(swept, exact.hidden, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model.logits(swept), exact.logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", EVERY, ids=IDS)
def test_a_token_changes_nothing_before_it_but_its_own_and_the_next_position(options):
    model, input_ids = context_model(**options), tokens(1, 6)
    before = model(input_ids).logits
    for position in range(1, 6):
        changed = input_ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY

        after = model(changed).logits

        assert torch.equal(after[:, :position], before[:, :position])
        assert (after - before)[:, position : position + 2].abs().amax(-1).min() > 1e-4


def test_only_the_context_is_read_from_the_position_before():
    model, input_ids = context_model(), tokens(2, 5)
    previous = torch.randn(2, 5, model.dim)
    other = torch.cat([previous[..., : model.context_dim], torch.randn(2, 5, model.token_dim)], dim=-1)

    assert torch.equal(
        model(input_ids, previous_hidden=previous).hidden, model(input_ids, previous_hidden=other).hidden
    )


def test_without_feedback_every_position_has_the_context_of_a_first_one():
    model, input_ids = context_model(), tokens(1, 5)
    previous = torch.randn(1, 5, model.dim)

    hidden = model.encode(input_ids, model.initial_state(1), previous_hidden=previous, use_feedback=False).hidden

    for position in range(5):
        alone = model(input_ids[:, position : position + 1]).hidden[:, 0]
        torch.testing.assert_close(hidden[:, position], alone)


def test_rows_reset_where_a_text_begins_equal_new_texts():
    model, first, second = context_model(num_input_tokens=3), tokens(2, 5), tokens(2, 4)
    state = model(first).state.reset(torch.tensor([False, True]))

    mixed = model(second, state).logits

    torch.testing.assert_close(mixed[1], model(second[1:]).logits[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(mixed[0], model(second[:1]).logits[0], atol=1e-3)


def test_context_layer_adds_to_the_context_and_reads_it_first():
    layer = ContextLayer(3, 2, ffn_layers=1, ffn_expand=2)
    context, token = torch.randn(4, 3), torch.randn(4, 2)

    weight, bias = layer.ffn.linears[0].weight, layer.ffn.linears[0].bias
    change = torch.nn.functional.gelu(context @ weight[:, :3].T + token @ weight[:, 3:].T + bias)
    expected = torch.nn.functional.layer_norm(context + change, (3,))

    torch.testing.assert_close(layer(context, tokens=token), expected)


def test_token_layer_adds_to_the_tokens_and_reads_the_context_first():
    layer = TokenLayer(2, 3, 3, ffn_layers=1, ffn_expand=2)
    context, hidden = torch.randn(4, 2), torch.randn(4, 3)

    weight, bias = layer.ffn.linears[0].weight, layer.ffn.linears[0].bias
    change = torch.nn.functional.gelu(context @ weight[:, :2].T + hidden @ weight[:, 2:].T + bias)
    expected = torch.nn.functional.layer_norm(hidden + change, (3,))

    torch.testing.assert_close(layer(hidden, context=context), expected)


def test_token_window_holds_the_last_tokens_oldest_first_and_zeros_before_a_text():
    embedded = torch.arange(1.0, 9.0).view(1, 4, 2)

    windows, after = token_window(embedded, torch.zeros(1, 2, 2))

    assert windows.tolist() == [[[0, 0, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]]]
    assert after.tolist() == [[[5, 6], [7, 8]]]


def test_token_layers_read_the_contexts_that_the_plan_names():
    contexts, previous, seen = [torch.full((1, 2), float(i)) for i in (1, 2, 3)], torch.zeros(1, 2), {}
    for plan in ("A", "E", "F", "G"):
        block = TokenBlock(2, 4, num_input_tokens=1, num_layers=3, ffn_layers=1, ffn_expand=2, plan=plan)
        reads = []
        for layer in block.layers:
            layer.forward = lambda hidden, context, reads=reads: reads.append(context) or hidden

        block(torch.zeros(1, 4), contexts=contexts, previous_context=previous)

        seen[plan] = [None if read is None else read[0, 0].item() for read in reads]
    assert seen == {"A": [3, 3, 3], "E": [1, 2, 3], "F": [3, None, None], "G": [0, None, 3]}


def test_all_plans_are_one_with_one_layer():
    assert [context_sources(plan, 1) for plan in ("A", "E", "F", "G")] == [["last"]] * 4
    input_ids = tokens(2, 4)
    logits = [context_model(num_layers=1, plan=plan)(input_ids).logits for plan in ("A", "E", "F", "G")]

    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_a_window_narrows_evenly_to_one_token_in_the_token_block():
    model = context_model(num_input_tokens=3)

    widths = [layer.norm.normalized_shape[0] for layer in model.token_block.layers]

    assert widths == [14, 10, 6]


@pytest.mark.parametrize(("weight_tying", "total"), [(False, 91_429_969), (True, 52_782_336)], ids=["untied", "tied"])
def test_parameters_of_the_published_size(weight_tying, total):
    with torch.device("meta"):
        model = ContextLM(50_257, context_config(dim=768, context_dim=768, num_layers=6, weight_tying=weight_tying))

    assert count_parameters(model)["total"] == total
    assert count_parameters(model.token_block)["total"] == 7_091_712
    assert count_parameters(model.context_block)["total"] == 7_091_712


@pytest.mark.parametrize("options", EVERY, ids=IDS)
def test_flops_are_those_of_one_sweep(options):
    model, input_ids = context_model(**options), tokens(2, 5)

    with FlopCounterMode(display=False) as counter:
        model(input_ids, previous_hidden=torch.zeros(2, 5, model.dim))

    assert counter.get_total_flops() == 10 * model.flops_per_token(5)


@pytest.mark.parametrize("options", EVERY, ids=IDS)
def test_state_bytes_are_those_of_the_tensors(options):
    model = context_model(**options)

    assert model(tokens(2, 5)).state.nbytes == 2 * model.state_bytes(5)


def test_gradient_reaches_every_parameter():
    model, input_ids = context_model(weight_tying=False, num_input_tokens=2), tokens(2, 5)

    model(input_ids).logits.square().sum().backward()

    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("init", "weights", "biases"), [("small", 0.02, 0.0), ("original", 0.1, 0.01)])
def test_weights_start_as_wide_as_init_says(init, weights, biases):
    torch.manual_seed(0)
    layer = ContextLM(VOCABULARY, context_config(dim=64, context_dim=64, init=init)).context_block.layers[0]

    linear = layer.ffn.linears[0]

    assert linear.weight.std().item() == pytest.approx(weights, rel=0.05)
    assert linear.bias.std().item() == pytest.approx(biases, rel=0.3)


def test_as_many_differentiated_sweeps_as_positions_give_the_gradient_through_time():
    model, input_ids = context_model().double(), tokens(2, 5)
    parameters = list(model.context_block.parameters())

    exact = torch.autograd.grad(model(input_ids).logits.square().sum(), parameters)
    start = torch.randn(2, 5, model.dim, dtype=torch.float64)
    states = solve(sweep_map(model, input_ids), start, sweeps=5, differentiate=5).states
    swept = torch.autograd.grad(model.logits(states).square().sum(), parameters)

    for one, other in zip(exact, swept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)
