"""Memory as a value: merged, closed before its time, measured, and steady over long texts."""

import pytest
import torch
from small_layers import SEGMENT, build, empty, texts

from newllm.config.compose import compose
from newllm.layers.memory import merge
from newllm.layers.telemetry import memory_telemetry
from newllm.models.transformer import TransformerLM
from newllm.state import tensors_of

LINEAR = ["infini-linear", "infini-joint", "infini-centred", "infini-ridge"]


def read(layer, *parts, batch_size=1):
    state = empty(layer, batch_size)
    for part in parts:
        _, state = layer(part, state)
    return state


@pytest.mark.parametrize("name", LINEAR)
def test_merged_memories_are_that_of_one_reader_of_both_texts(name):
    layer, one, other = build(name), texts(2, 2 * SEGMENT), texts(2, 3 * SEGMENT, seed=1)

    merged = merge([read(layer, one, batch_size=2).memory, read(layer, other, batch_size=2).memory])

    both = read(layer, one, other, batch_size=2).memory
    for key, tensor in tensors_of(both).items():
        torch.testing.assert_close(tensors_of(merged)[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["multi-centred", "multi-ridge", "hierarchical-centred", "multi-joint"])
def test_merged_banks_hold_together_what_one_reader_holds(name):
    layer, one, other = build(name), texts(1, 2 * SEGMENT), texts(1, 4 * SEGMENT, seed=1)

    merged = merge([read(layer, one).memory, read(layer, other).memory])

    both = read(layer, one, other).memory  # the same segments, in other banks
    for key, tensor in tensors_of(both).items():
        torch.testing.assert_close(tensors_of(merged)[key].sum(1), tensor.sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["infini", "infini-delta-token", "multi"])
def test_memories_of_the_delta_rule_are_not_merged(name):
    memory = empty(build(name), 1).memory

    with pytest.raises(ValueError, match="written by the delta rule"):
        merge([memory, memory])


def test_memories_of_other_shapes_are_not_merged():
    memories = [empty(build("infini-linear", memory_heads=heads), 1).memory for heads in (1, 2)]

    with pytest.raises(ValueError, match=r"matrix has shapes \[1, 1, 1, 8, 8\] and \[1, 1, 2, 4, 4\]"):
        merge(memories)
    with pytest.raises(ValueError, match="was given no memories"):
        merge([])


@pytest.mark.parametrize("name", [*LINEAR, "infini", "infini-delta-token", "multi"])
def test_closing_a_segment_writes_what_is_open(name):
    layer, short = build(name), build(name, segment_length=SEGMENT - 1)
    hidden = texts(1, SEGMENT - 1)

    closed = layer.close_segment(read(layer, hidden))

    for key, tensor in tensors_of(read(short, hidden).memory).items():
        torch.testing.assert_close(tensors_of(closed.memory)[key], tensor, atol=1e-6, rtol=1e-6)
    assert closed.open_lengths == (0,)
    assert closed.keys.shape[2] == 0


def test_closing_segments_of_rows_at_different_places():
    layer = build("infini-heads-banks")
    state = read(layer, texts(2, SEGMENT + 1), batch_size=2).reset([True, False])
    _, state = layer(texts(2, 1, seed=1), state)

    closed = layer.close_segment(state)

    for row in range(2):
        alone = layer.close_segment(state.select([row]))
        torch.testing.assert_close(closed.memory.norm[row], alone.memory.norm[0])
        torch.testing.assert_close(closed.memory.matrix[row], alone.memory.matrix[0])
    assert closed.segments_in_bank == (1, 0)


def test_closing_an_empty_segment_changes_nothing():
    layer = build("infini")
    state = read(layer, texts(1, SEGMENT))

    closed = layer.close_segment(state)

    assert all(torch.equal(t, tensors_of(closed)[k]) for k, t in tensors_of(state).items())


@pytest.mark.parametrize("name", ["infini", "infini-centred", "infini-ridge", "infini-delta-token", "multi-ridge"])
def test_answers_stay_bounded_over_a_long_text(name):
    layer = build(name, local="none", segment_length=64)
    # Tokens with a common part: sums that are not normalised grow with their number.
    hidden = texts(1, 64 * 256) + 2 * texts(1, 1, seed=3)

    output, _ = layer(hidden, empty(layer, 1))

    early, late = output[:, 64 * 2 : 64 * 8], output[:, -64 * 8 :]
    assert torch.isfinite(output).all()
    assert late.abs().max() < 3 * early.abs().max()


@pytest.mark.parametrize("name", ["infini", "infini-delta-token", "multi", "hierarchical-ridge"])
def test_memory_kept_for_the_gradient_is_linear_in_length(name):
    layer = build(name, segment_length=16)

    def kept_bytes(length):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
            return tensor

        kept = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(texts(1, length).requires_grad_(), empty(layer, 1))
        return sum(storages.values())

    assert kept_bytes(1024) <= 4.4 * kept_bytes(256)


def test_telemetry_tells_how_much_the_memory_weighs_and_says():
    layer, hidden = build("infini"), texts(2, 2 * SEGMENT)
    layer.memory_gate.data.fill_(1.0)

    fresh = layer.telemetry(hidden[:, :SEGMENT], empty(layer, 2))
    both = layer.telemetry(hidden, empty(layer, 2))

    assert fresh == {"gate_mean": 0.0, "read_norm": 0.0}
    # Half of the positions come before anything is written: they are left out.
    assert both["gate_mean"] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())
    assert both["read_norm"] > 0


def test_model_telemetry_tells_of_each_layer_and_their_mean():
    layers = [build("pythia"), build("multi"), build("hierarchical")]
    model = TransformerLM(11, 8, layers)
    input_ids = torch.arange(10).view(1, 10)

    measured = memory_telemetry(model, input_ids)

    both, multi, coarse = {"gate_mean", "read_norm"}, {"selection_entropy"}, {"expansion_mean", "expanded_share"}
    assert set(measured) == {
        *(f"memory/{name}" for name in both | multi | coarse),
        *(f"memory/{name}_layer_1" for name in both | multi),
        *(f"memory/{name}_layer_2" for name in both | coarse),
    }
    norms = [measured[f"memory/read_norm_layer_{place}"] for place in (1, 2)]
    assert measured["memory/read_norm"] == pytest.approx(sum(norms) / 2)
    assert measured["memory/expanded_share"] == 1
    alone = memory_telemetry(TransformerLM(11, 8, [build("pythia"), build("infini")]), input_ids)
    assert set(alone) == {f"memory/{name}" for name in both}
    assert memory_telemetry(TransformerLM(11, 8, [build("pythia")]), input_ids) == {}
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("name", ["infini", "infini-joint", "infini-memory-only"])
def test_weight_of_the_memory_leaves_out_positions_before_it_in_calls_of_one_token_too(name):
    layers, input_ids = [build(name), build(name)], torch.arange(10).view(1, 10)
    at_once, one_by_one = TransformerLM(11, 8, layers), TransformerLM(11, 8, layers, feedback="additive")
    one_by_one.load_state_dict(at_once.state_dict(), strict=False)

    expected, measured = memory_telemetry(at_once, input_ids), memory_telemetry(one_by_one, input_ids)

    assert measured == pytest.approx(expected, rel=1e-5)  # P is zero: the same function


def test_model_telemetry_measures_what_is_deployed_and_leaves_the_model_training():
    model = TransformerLM(11, 8, [build("hierarchical", expand_threshold=1.0)]).train()

    measured = memory_telemetry(model, torch.arange(10).view(1, 10))

    assert measured["memory/expanded_share"] == 0  # training would read every fine memory
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["layers=infini", "layers.memory_kernel=ridge", "layers.write=delta"],
            "is not how layers.memory_kernel=ridge",
        ),
        (["layers=infini", "layers.memory_kernel=delta_token", "layers.write=linear"], "Allowed with it: delta, null"),
        (["layers=infini", "layers.memory_kernel=centred", "layers.mix=joint"], "memory_kernel=centred has none"),
        (["layers=hierarchical", "layers.mix=joint"], "layers.mix=joint: gives memory and local attention one"),
        (["layers=multi_memory", "layers.memory_heads=3"], "layers.memory_heads=3: does not divide model.dim"),
        (["layers=infini", "layers.mix=joint", "layers.local=softmax"], "layers.local=softmax has none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        compose(["model=pythia", *overrides])


@pytest.mark.parametrize("name", [*LINEAR, "infini-delta-token"])
def test_a_segment_of_a_half_precision_state_is_closed_in_fp32(name):
    layer = build(name)
    state = read(layer, texts(1, SEGMENT + 2))

    closed = layer.close_segment(state.to(torch.bfloat16))

    expected = layer.close_segment(state)
    assert closed.memory.matrix.dtype == torch.float32
    torch.testing.assert_close(closed.memory.matrix, expected.memory.matrix, atol=0.05, rtol=0.05)
