"""What a memory layer costs beside the softmax layer it stands for."""

import time

import pytest
from small_layers import build, empty, texts

SIZES = {"nano": (128, 4, 512), "small": (256, 8, 1024)}
# As conf/layers has them.
HEADS = {
    "infini": 1,
    "infini-softmax": 1,
    "infini-centred": 1,
    "infini-ridge": 8,  # its solves grow with the cube of a head's dims
    "infini-delta-token": 1,
    "multi": 8,
    "hierarchical": 8,
}


def step_seconds(layers, hidden, rounds):
    """Shortest processor time of a forward and backward pass, layers in turn so that all see the same neighbours."""
    best = dict.fromkeys(layers, float("inf"))
    for _ in range(rounds):
        for name, layer in layers.items():
            start = time.process_time()
            layer(hidden, empty(layer, hidden.shape[0]))[0].sum().backward()
            best[name] = min(best[name], time.process_time() - start)
    return best


@pytest.mark.timing
@pytest.mark.parametrize("size", SIZES)
def test_a_step_takes_at_most_one_and_a_half_times_that_of_softmax_attention(size):
    dim, num_heads, mlp_dim = SIZES[size]
    hidden = texts(16, 256, dim=dim).requires_grad_()
    layers = {
        name: build(name, dim=dim, mlp_dim=mlp_dim, segment_length=64, memory_heads=heads)
        for name, heads in HEADS.items()
    }
    layers["pythia"] = build("pythia", dim=dim, mlp_dim=mlp_dim, num_heads=num_heads, rotary_share=0.25)

    seconds = step_seconds(layers, hidden, rounds=8)

    ratios = {name: round(value / seconds["pythia"], 2) for name, value in seconds.items()}
    assert max(ratios.values()) <= 1.5, ratios


@pytest.mark.timing
def test_time_is_linear_in_length():
    layer = build("infini", dim=64, mlp_dim=128, segment_length=64)
    texts_by_length = {length: texts(1, length, dim=64).requires_grad_() for length in (256, 8192)}

    seconds = {length: step_seconds({0: layer}, hidden, rounds=4)[0] for length, hidden in texts_by_length.items()}

    assert seconds[8192] <= 1.5 * 32 * seconds[256], seconds
