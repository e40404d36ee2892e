"""MultiMemoryLayer and HierarchicalLayer: who is written, who is asked, and what it costs."""

import dataclasses

import pytest
import torch
from small_layers import DIM, SEGMENT, build, empty, in_calls, projected, texts
from torch.utils.flop_counter import FlopCounterMode

from newllm.layers.hierarchical import HierarchicalLayer


def after(layer, num_segments, *, batch_size=1):
    return layer(texts(batch_size, num_segments * SEGMENT), empty(layer, batch_size))[1]


def with_parameters_of(layer, other):
    layer.load_state_dict({**layer.state_dict(), **other.state_dict()}, strict=False)
    for name, parameter in other.named_parameters():
        if name in dict(layer.named_parameters()):
            assert torch.equal(dict(layer.named_parameters())[name], parameter)
    return layer


@pytest.mark.parametrize("name", ["multi", "hierarchical"])
def test_memories_are_written_in_turn(name):
    layer = build(name)
    state, written = empty(layer, 1), []
    for index in range(5):
        _, following = layer(texts(1, SEGMENT, seed=index), state)
        changed = (following.memory.norm != state.memory.norm).flatten(2).any(2)[0]
        written.append(changed.nonzero().flatten().tolist())
        state = following

    assert written == [[0], [1], [2], [0], [1]]


def test_only_memories_that_hold_something_are_chosen():
    layer, hidden = build("multi", local="none"), texts(1, 2 * SEGMENT)
    single = with_parameters_of(build("infini", memory_heads=2, local="none"), layer)

    output, _ = in_calls(layer, hidden, [2 * SEGMENT])

    # While one of three holds something, all the weight is its.
    torch.testing.assert_close(output, in_calls(single, hidden, [2 * SEGMENT])[0], atol=1e-5, rtol=1e-5)


def test_choice_does_not_depend_on_how_much_was_written():
    # Sums over all keys, unscaled, made the fullest memory win whatever it held.
    layer, hidden = build("multi", write="linear"), texts(1, SEGMENT, seed=5)
    state = after(layer, 3)
    factors = torch.tensor([1.0, 30.0, 1.0]).view(1, 3, 1, 1)
    fuller = dataclasses.replace(
        state.memory, matrix=state.memory.matrix * factors.unsqueeze(-1), norm=state.memory.norm * factors
    )

    output, _ = layer(hidden, dataclasses.replace(state, memory=fuller))

    torch.testing.assert_close(output, layer(hidden, state)[0], atol=1e-5, rtol=1e-5)


def test_each_position_chooses_the_memory_where_its_key_lies():
    layer = build("multi", local="none", memory_heads=1, num_memories=2)
    layer.selection_gate.data.fill_(6.0)
    state, hidden = empty(layer, 1), texts(1, 2)
    features = torch.nn.functional.elu(projected(layer, hidden)[0]) + 1
    norm = features.view(1, 2, 1, DIM)
    values = torch.tensor([[1.0], [-1.0]]) * torch.ones(2, DIM)  # memory 0 answers 1, memory 1 answers -1
    matrix = norm.unsqueeze(-1) * values.view(1, 2, 1, 1, DIM)
    state = dataclasses.replace(state, memory=dataclasses.replace(state.memory, matrix=matrix, norm=norm))

    output, _ = layer(hidden, state)

    expected = hidden + layer.output(values)[None] + layer.mlp(layer.mlp_norm(hidden))
    # exp(6) = 400: what is left for the other memory is exp of minus 400 times the difference of their cosines.
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)


def shut(layer, bias):
    """The layer with an expansion that is the same everywhere."""
    layer.expansion_gate[2].weight.data.zero_()
    layer.expansion_gate[2].bias.data.fill_(bias)
    return layer


def test_coarse_memory_is_the_sum_of_the_fine_ones():
    layer, hidden = shut(build("hierarchical", write="linear"), -60.0), texts(1, 5 * SEGMENT)
    single = with_parameters_of(build("infini", memory_heads=2, write="linear"), layer)

    output, _ = layer(hidden, empty(layer, 1))

    torch.testing.assert_close(output, single(hidden, empty(single, 1))[0], atol=1e-5, rtol=1e-5)


def test_full_expansion_is_the_choice_between_memories():
    layer, hidden = shut(build("hierarchical"), 60.0), texts(1, 5 * SEGMENT)
    multi = with_parameters_of(build("multi"), layer)

    output, _ = layer(hidden, empty(layer, 1))

    torch.testing.assert_close(output, multi(hidden, empty(multi, 1))[0], atol=1e-5, rtol=1e-5)


def texts_of(part):
    """Decisions of a part of a call [B, n * m]."""
    return part.decisions.unflatten(0, (part.num_segments, -1)).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kernel", ["elu", "centred", "ridge", "delta_token"])
def test_positions_below_the_threshold_read_the_coarse_memory_only(kernel):
    options = {"memory_kernel": kernel, "write": None}
    everywhere, hidden = build("hierarchical", **options).eval(), texts(2, 5 * SEGMENT)
    state = after(everywhere, 3, batch_size=2)
    nowhere = shut(build("hierarchical", **options).eval(), -60.0)
    parts, _ = everywhere._attend(everywhere.attention_norm(hidden), state, update_memory=True)
    expansion = torch.cat([texts_of(part) for part in parts], dim=1)
    threshold = float(expansion.detach().median())
    some = build("hierarchical", expand_threshold=threshold, **options).eval()

    output, _ = some(hidden, state)

    is_expanded = (expansion >= threshold).unsqueeze(-1)
    expected = torch.where(is_expanded, everywhere(hidden, state)[0], nowhere(hidden, state)[0])
    assert 0 < is_expanded.sum() < is_expanded.numel()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert some.telemetry(hidden, state)["expanded_share"] == pytest.approx(float(is_expanded.float().mean()))


def count_flops(layer, hidden, state):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(hidden, state)
    return counter.get_total_flops()


def test_threshold_saves_the_fine_reads():
    hidden, length = texts(1, 3 * SEGMENT), 3 * SEGMENT
    layers = [shut(build("hierarchical", expand_threshold=t).eval(), 0.0) for t in (0.4, 0.6)]
    state = after(layers[0], 3)

    full, coarse = (count_flops(layer, hidden, state) for layer in layers)

    heads, width = 2, DIM // 2
    reads = 2 * length * 3 * heads * width * (width + 1)  # three memories
    choice = 2 * length * 3 * heads * width
    assert full - coarse == reads + choice
    assert layers[0].telemetry(hidden, state)["expanded_share"] == 1
    assert layers[1].telemetry(hidden, state)["expanded_share"] == 0


def test_training_reads_fine_memories_everywhere():
    thresholded, layer = build("hierarchical", expand_threshold=1.0), build("hierarchical")
    hidden, state = texts(1, 2 * SEGMENT), after(layer, 3)

    output, _ = thresholded.train()(hidden, state)

    assert torch.equal(output, layer(hidden, state)[0])
    assert thresholded.telemetry(hidden, state)["expanded_share"] == 1


def test_expansion_gate_has_the_specified_size():
    layer = build("hierarchical", dim=512, memory_heads=8)

    assert isinstance(layer, HierarchicalLayer)
    assert sum(parameter.numel() for parameter in layer.expansion_gate.parameters()) == 65_793
    assert (
        sum(p.numel() for p in layer.parameters())
        == sum(p.numel() for p in build("multi", dim=512, memory_heads=8).parameters()) + 65_793
    )


@pytest.mark.parametrize("name", ["multi", "hierarchical"])
def test_gates_are_named_so_that_the_optimizer_finds_them(name):
    layer = build(name)
    shapes = {key: parameter.shape for key, parameter in layer.named_parameters() if "gate" in key}

    assert shapes["selection_gate"] == ()
    assert shapes["memory_gate"] == (2,)
    assert any(key.startswith("expansion_gate") for key in shapes) == (name == "hierarchical")
