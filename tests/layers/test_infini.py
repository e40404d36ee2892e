"""What Infini-attention promises beyond the contract of every layer."""

import pytest
import torch
from small_layers import SEGMENT, build, empty, in_calls, projected, texts

from newllm.layers.memory import feature_map


@pytest.mark.parametrize("segment_length", [1, 2, 3, 7, 12, 24])
def test_joint_linear_memory_does_not_depend_on_segment_length(segment_length):
    hidden = texts(2, 24)
    whole, _ = in_calls(build("infini-joint", segment_length=24), hidden, [24])

    output, _ = in_calls(build("infini-joint", segment_length=segment_length), hidden, [24])

    torch.testing.assert_close(output, whole, atol=1e-5, rtol=1e-5)


def test_joint_linear_memory_is_causal_linear_attention():
    layer, hidden = build("infini-joint"), texts(1, 11)
    queries, keys, values = projected(layer, hidden)
    queries, keys = feature_map(queries), feature_map(keys)
    expected = []
    for t in range(11):
        weights = queries[t] @ keys[: t + 1].T
        expected.append(weights @ values[: t + 1] / weights.sum())

    output, _ = layer(hidden, empty(layer, 1))

    attended = layer.output(torch.stack(expected)) + hidden[0] + layer.mlp(layer.mlp_norm(hidden))[0]
    torch.testing.assert_close(output[0], attended, atol=1e-5, rtol=1e-5)


def plain_delta(layer, hidden, segment):
    """Memory after whole segments of one text, one head, written token by token from the paper's equation 5."""
    _, keys, values = projected(layer, hidden)
    keys = feature_map(keys)
    matrix, norm = torch.zeros(keys.shape[1], values.shape[1]), torch.zeros(keys.shape[1])
    for start in range(0, len(keys), segment):
        change, change_of_norm = torch.zeros_like(matrix), torch.zeros_like(norm)
        for key, value in zip(keys[start : start + segment], values[start : start + segment], strict=True):
            known = key @ matrix / (key @ norm) if norm.sum() > 0 else 0
            change += torch.outer(key, value - known)
            change_of_norm += key
        matrix, norm = matrix + change, norm + change_of_norm
    return matrix, norm


def test_delta_write_adds_what_the_memory_does_not_answer():
    layer, hidden = build("infini"), texts(1, 3 * SEGMENT)

    _, state = layer(hidden, empty(layer, 1))

    matrix, norm = plain_delta(layer, hidden, SEGMENT)
    torch.testing.assert_close(state.memory.matrix[0, 0, 0], matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.memory.norm[0, 0, 0], norm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segment_length", [1, 8, 64])
def test_reading_one_written_segment_is_full_linear_attention(segment_length):
    # The first prototypes normalised memory and normaliser differently: reads came out S times too small.
    layer = build("infini-memory-only", segment_length=segment_length, write="linear")
    hidden = texts(1, segment_length)
    _, state = layer(hidden, empty(layer, 1))

    answer, _ = layer(hidden, state)

    queries, keys, values = projected(layer, hidden)
    weights = feature_map(queries) @ feature_map(keys).T
    read = weights @ values / weights.sum(1, keepdim=True)
    expected = hidden[0] + layer.output(read) + layer.mlp(layer.mlp_norm(hidden))[0]
    torch.testing.assert_close(answer[0], expected, atol=1e-5, rtol=1e-4)


def test_gate_is_exactly_zero_while_the_memory_is_empty():
    layer, hidden = build("infini"), texts(1, SEGMENT)
    closed, _ = layer(hidden, empty(layer, 1))
    layer.memory_gate.data.fill_(50.0)

    open_gate, _ = layer(hidden, empty(layer, 1))

    assert torch.equal(open_gate, closed)


def test_memory_only_layer_adds_nothing_while_empty():
    layer, hidden = build("infini-memory-only"), texts(1, SEGMENT)

    output, _ = layer(hidden, empty(layer, 1))

    assert torch.equal(output, hidden + layer.mlp(layer.mlp_norm(hidden)))


def test_banks_are_written_in_turn():
    layer = build("infini-heads-banks")  # three banks, two segments each
    state, written = empty(layer, 1), []
    for index in range(8):
        _, after = layer(texts(1, SEGMENT, seed=index), state)
        changed = (after.memory.norm != state.memory.norm).flatten(2).any(2)[0]
        written.append(changed.nonzero().flatten().tolist())
        state = after

    assert written == [[0], [0], [1], [1], [2], [2], [0], [0]]


def test_frozen_banks_are_read_and_never_written():
    layer = build("infini-heads-banks")
    _, state = layer(texts(1, 3 * SEGMENT), empty(layer, 1))
    frozen = state.freeze([1])

    output, after = layer(texts(1, 6 * SEGMENT, seed=1), frozen)

    assert torch.equal(after.memory.matrix[:, 1], state.memory.matrix[:, 1])
    assert torch.equal(after.memory.norm[:, 1], state.memory.norm[:, 1])
    assert not torch.equal(after.memory.norm[:, 2], state.memory.norm[:, 2])
    forgotten = frozen.reset([True], keep_frozen=False)
    assert not torch.allclose(layer(texts(1, 6 * SEGMENT, seed=1), forgotten)[0], output)


def test_writing_with_all_banks_frozen_is_a_no_op():
    layer = build("infini-heads-banks")
    _, state = layer(texts(1, 3 * SEGMENT), empty(layer, 1))

    _, after = layer(texts(1, 4 * SEGMENT, seed=1), state.freeze())

    assert torch.equal(after.memory.matrix, state.memory.matrix)
    assert torch.equal(after.memory.norm, state.memory.norm)
    assert after.current_bank == state.current_bank


def test_reset_keeps_frozen_banks_unless_told_otherwise():
    layer = build("infini-heads-banks")
    _, state = layer(texts(2, 6 * SEGMENT), empty(layer, 2))
    frozen = state.freeze([0])

    fresh = frozen.reset([True, False])
    forgotten = frozen.reset([True, True], keep_frozen=False)

    assert torch.equal(fresh.memory.matrix[:, 0], state.memory.matrix[:, 0])
    assert fresh.memory.matrix[0, 1:].abs().sum() == 0
    assert torch.equal(fresh.memory.matrix[1], state.memory.matrix[1])
    assert forgotten.memory.matrix.abs().sum() == 0
    assert forgotten.frozen == (False, False, False)


def test_thawed_banks_are_written_again():
    layer = build("infini")
    state = empty(layer, 1).freeze()

    _, after = layer(texts(1, SEGMENT), state.freeze([0], is_frozen=False))

    assert after.memory.norm.sum() > 0


def test_freezing_an_unknown_bank_names_the_banks_that_exist():
    with pytest.raises(ValueError, match=r"bank 3: does not exist\. Allowed: 0 to 2"):
        empty(build("infini-heads-banks"), 1).freeze([3])


def test_bank_weights_are_shares_of_the_banks_that_hold_something():
    # An empty bank that keeps its share shrinks what the others say.
    layer = build("infini-heads-banks", local="none", write="linear")
    single = build("infini-heads-banks", local="none", write="linear", num_memory_banks=1)
    single.load_state_dict(layer.state_dict(), strict=False)
    hidden = texts(1, 2 * SEGMENT)  # fills bank 0 only

    output, _ = in_calls(layer, hidden, [SEGMENT, SEGMENT])

    torch.testing.assert_close(output, in_calls(single, hidden, [SEGMENT, SEGMENT])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dim", "changes", "expected"),
    [
        (512, {}, 1_050_624),
        (512, {"memory_heads": 8}, 133_120),
        (512, {"memory_heads": 8, "num_memory_banks": 4}, 532_480),
    ],
)
def test_state_bytes_of_the_published_sizes(dim, changes, expected):
    layer = build("infini", dim=dim, **changes)

    assert layer.state_bytes(0) == expected
    assert empty(layer, 1).nbytes == expected
