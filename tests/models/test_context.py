"""The context model: layers as defined, the published counts."""

import pytest
import torch
from small_context import VOCABULARY, context_config, context_model, tokens

from newllm.layers.context_block import ContextLayer, TokenBlock, TokenLayer, context_sources
from newllm.models.base import count_parameters
from newllm.models.context import ContextLM
from newllm.models.context_state import token_window


def test_without_feedback_every_position_has_the_context_of_a_first_one():
    model, input_ids = context_model(), tokens(1, 5)
    previous = torch.randn(1, 5, model.dim)

    hidden = model.encode(input_ids, model.initial_state(1), previous_hidden=previous, use_feedback=False).hidden

    for position in range(5):
        alone = model(input_ids[:, position : position + 1]).hidden[:, 0]
        torch.testing.assert_close(hidden[:, position], alone)


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


@pytest.mark.parametrize(("init", "weights", "biases"), [("small", 0.02, 0.0), ("original", 0.1, 0.01)])
def test_weights_start_as_wide_as_init_says(init, weights, biases):
    torch.manual_seed(0)
    layer = ContextLM(VOCABULARY, context_config(dim=64, context_dim=64, init=init)).context_block.layers[0]

    linear = layer.ffn.linears[0]

    assert linear.weight.std().item() == pytest.approx(weights, rel=0.05)
    assert linear.bias.std().item() == pytest.approx(biases, rel=0.3)
