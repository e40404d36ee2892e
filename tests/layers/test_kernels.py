"""Memory kernels against plain references: loops over tokens, and sums over the tokens themselves."""

import time

import pytest
import torch
from small_layers import build, empty, in_calls, projected, texts
from torch.nn.functional import normalize

from newllm.config.compose import compose
from newllm.layers.banks import Banks
from newllm.layers.kernels import Centred, DeltaToken, Elu, Ridge
from newllm.layers.memory import Bank, feature_map
from newllm.layers.segments import Tokens, causal_scores, cut, one_segment
from newllm.models.create import build_model

PENALTY = 0.1  # of the layers in small_layers
SEGMENT = 4


def read_elu(query, keys, values):
    weights = feature_map(keys) @ feature_map(query)
    return weights @ values / weights.sum()


def read_centred(query, keys, values):
    features, deviation = feature_map(keys), feature_map(query) - feature_map(keys).mean(0)
    weights = (features - features.mean(0)) @ deviation
    return weights @ (values - values.mean(0)) / (1 + len(keys) / keys.shape[1])


def read_ridge(query, keys, values):
    features = feature_map(keys)
    penalty = PENALTY * (1 + features.square().sum(0).mean())
    # Least squares with the penalty as further rows: no normal equations.
    rows = torch.cat([features, penalty.sqrt() * torch.eye(keys.shape[1], dtype=keys.dtype)])
    targets = torch.cat([values, torch.zeros(keys.shape[1], values.shape[1], dtype=values.dtype)])
    return feature_map(query) @ torch.linalg.lstsq(rows, targets).solution


def delta_token_loop(queries, keys, values, strengths):
    """The delta rule one token after another: what each query reads just after its own token is written."""
    queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
    matrix, answers = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype), []
    for query, key, value, strength in zip(queries, keys, values, strengths, strict=True):
        matrix = matrix + strength * torch.outer(key, value - key @ matrix)
        answers.append(query @ matrix)
    return torch.stack(answers), matrix


def finish(layer, hidden, answers):
    return hidden + layer.output(answers) + layer.mlp(layer.mlp_norm(hidden))


@pytest.mark.parametrize(
    ("kernel", "write", "read"),
    [("elu", "linear", read_elu), ("centred", None, read_centred), ("ridge", None, read_ridge)],
)
def test_reads_are_those_of_the_tokens_in_closed_segments(kernel, write, read):
    layer = build("infini", memory_kernel=kernel, write=write, local="none").double()
    hidden = texts(1, 4 * SEGMENT + 2, dtype=torch.float64)
    queries, keys, values = projected(layer, hidden)
    answers = torch.zeros_like(values)
    for t in range(SEGMENT, len(queries)):
        closed = t // SEGMENT * SEGMENT
        answers[t] = read(queries[t], keys[:closed], values[:closed])

    output, _ = layer(hidden, empty(layer, 1, torch.float64))

    torch.testing.assert_close(output, finish(layer, hidden, answers), atol=1e-9, rtol=1e-9)


def test_delta_token_equals_the_loop_over_tokens():
    layer = build("infini-delta-token-only")
    hidden = texts(1, 4 * SEGMENT + 2)
    normed = layer.attention_norm(hidden)[0]
    answers, matrix = delta_token_loop(*projected(layer, hidden), layer.strength(normed).sigmoid())

    output, _ = layer(hidden, empty(layer, 1))
    _, state = layer(hidden[:, : 4 * SEGMENT], empty(layer, 1))

    torch.testing.assert_close(output, finish(layer, hidden, answers), atol=1e-5, rtol=1e-5)
    _, matrix = delta_token_loop(
        *(p[: 4 * SEGMENT] for p in projected(layer, hidden)), layer.strength(normed).sigmoid()[: 4 * SEGMENT]
    )
    torch.testing.assert_close(state.memory.matrix[0, 0, 0], matrix, atol=1e-5, rtol=1e-5)


def test_gradient_of_delta_token_is_that_of_the_loop():
    layer = build("infini-delta-token-only").double()
    hidden = texts(1, 3 * SEGMENT + 1, dtype=torch.float64).requires_grad_()
    normed = layer.attention_norm(hidden)[0]
    answers, _ = delta_token_loop(*projected(layer, hidden), layer.strength(normed).sigmoid())

    output, _ = layer(hidden, empty(layer, 1, torch.float64))

    inputs = hidden, layer.strength.weight, layer.query_key_value.weight
    expected = torch.autograd.grad(finish(layer, hidden, answers).square().sum(), inputs)
    for own, plain in zip(torch.autograd.grad(output.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(own, plain, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("segment_length", [1, 2, 3, 7, 12, 24])
def test_delta_token_does_not_depend_on_segment_length(segment_length):
    hidden = texts(2, 24)
    whole, _ = in_calls(build("infini-delta-token-only", segment_length=24), hidden, [24])

    output, _ = in_calls(build("infini-delta-token-only", segment_length=segment_length), hidden, [24])

    torch.testing.assert_close(output, whole, atol=1e-5, rtol=1e-5)


def test_frozen_delta_token_memory_still_answers_from_the_open_segment():
    layer = build("infini-delta-token-only")
    hidden = texts(1, SEGMENT)

    output, after = layer(hidden, empty(layer, 1).freeze())

    assert after.memory.matrix.abs().sum() == 0
    torch.testing.assert_close(output, layer(hidden, empty(layer, 1))[0])


@pytest.mark.parametrize("name", ["infini-ridge", "infini-centred", "infini-delta-token"])
def test_an_empty_memory_answers_nothing(name):
    layer = build(name)
    hidden = texts(1, SEGMENT)
    zero_gate = build(name)
    zero_gate.memory_gate.data.fill_(-60.0)

    output, _ = layer(hidden, empty(layer, 1).freeze())

    # delta_token reads the open segment, all others are silent before the first one closes.
    is_silent = torch.allclose(output, zero_gate(hidden, empty(layer, 1))[0], atol=1e-6)
    assert is_silent == (name != "infini-delta-token")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("infini", 4 * (64 * 64 + 64)),
        ("infini-centred", 4 * (64 * 64 + 2 * 64 + 1)),
        ("infini-ridge", 2 * 4 * (2 * 32 * 32 + 32)),
        ("infini-delta-token", 4 * (64 * 64 + 64)),
    ],
)
def test_state_bytes_of_each_kernel(name, expected):
    layer = build(name, dim=64)

    assert layer.state_bytes(0) == expected
    assert empty(layer, 1).nbytes == expected


def test_kernels_are_compared_at_equal_state_bytes():
    # As conf/sweep/memory_kernels.yaml compares them: ridge keeps two matrices of half the side on each of two heads.
    sizes = {
        kernel: build_model(
            compose(["experiment=mqar", f"layers.memory_kernel={kernel}", f"layers.memory_heads={heads}"]), 256
        ).state_bytes(128)
        for kernel, heads in {"elu": 1, "centred": 1, "delta_token": 1, "ridge": 2}.items()
    }

    assert sizes["elu"] == sizes["delta_token"] == sizes["ridge"]
    assert sizes["centred"] - sizes["elu"] == 4 * (64 + 1)  # the sum of the values, and a count


# --- untrained keys: what a kernel can hold before anything is learned ---

DIM, TRIALS = 64, 24


def write_pairs(kernel, keys, values, *, segment_length, strength=1.0):
    """Memory after pairs [R, n, d] were written in segments, and the segments' shape for reading them back."""
    memory = kernel.empty(TRIALS, 1, 1, DIM, device=keys.device, dtype=keys.dtype)
    banks = memory.by_bank()
    for key, value in zip(keys.split(segment_length, dim=1), values.split(segment_length, dim=1), strict=True):
        banks = kernel.write(banks, kernel.arrange(segment_of(key[:, :0], key, value, strength)), [0]).last
    return Bank(*(sums.squeeze(0) for sums in banks))


def segment_of(queries, keys, values, strength):
    tokens = Tokens(*(tensor.unsqueeze(1) for tensor in (keys, values, torch.full_like(keys[..., :1], strength))))
    return one_segment(queries.unsqueeze(1), tokens)


def top1(kernel, bank, queries, candidates):
    """Share of queries i whose answer is closest, in cosine, to candidate i."""
    answers = kernel.read(bank, kernel.arrange(segment_of(queries, queries, queries, 0.0)).as_rows()).answers()[:, 0]
    scores = answers @ normalize(candidates, dim=-1).transpose(1, 2)
    return (scores.argmax(-1) == torch.arange(queries.shape[1])).float().mean().item()


@pytest.mark.parametrize(
    ("kernel", "pairs", "low", "high"),
    [
        (Elu("linear"), 16, 0.15, 0.30),
        (Elu("linear"), 128, 0.0, 0.05),
        (Centred(), 16, 0.99, 1.0),
        (Centred(), 128, 0.94, 1.0),
        (Ridge(0.01), 16, 0.99, 1.0),
        (Ridge(0.01), 128, 0.99, 1.0),
    ],
)
def test_recall_of_random_pairs(kernel, pairs, low, high):
    keys, values = torch.randn(TRIALS, pairs, DIM), torch.randn(TRIALS, pairs, DIM)

    bank = write_pairs(kernel, keys, values, segment_length=64)

    assert low <= top1(kernel, bank, keys, values) <= high


def test_overwritten_pairs_read_the_last_value():
    keys, others = torch.randn(TRIALS, 16, DIM), torch.randn(TRIALS, 64, DIM)
    old, latest, noise = (torch.randn(TRIALS, n, DIM) for n in (16, 16, 64))
    written = torch.cat([keys, keys, others], dim=1), torch.cat([old, latest, noise], dim=1)
    candidates = torch.cat([latest, old], dim=1)

    shares = {
        kernel.__class__: top1(kernel, write_pairs(kernel, *written, segment_length=32, strength=0.9), keys, candidates)
        for kernel in (Elu("linear"), Elu("delta"), DeltaToken())
    }

    assert shares[DeltaToken] >= 0.7
    assert shares[Elu] <= 0.2


def delta_token_in_segments(queries, keys, values, strengths):
    """As the loop, for one text and head, by the kernel in segments of 64 tokens."""
    kernel = DeltaToken()
    memory = kernel.empty(1, 1, 1, keys.shape[1], device=keys.device, dtype=keys.dtype)
    banks = Banks(kernel, memory, current=0, segments_written=0, segments_per_bank=1, frozen=(False,))
    projected = torch.stack([queries, keys, values], dim=1)[None, :, :, None]
    open_tokens = Tokens(*(tensor[None, None] for tensor in (keys, values, strengths))).last(0)
    answers, at_once = [], banks.segments_at_once()
    for segments in cut(projected, strengths[None, :, None], open_tokens, 64, at_once=at_once):
        answers.append(banks.pass_over(segments, writes=True).read_only().answers()[:, 0].flatten(0, 1))
    return torch.cat(answers)


@pytest.mark.slow
def test_delta_token_trains_ten_times_as_fast_as_its_loop():
    inputs = [torch.randn(2048, 64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.rand(2048, 1, requires_grad=True))
    plain_answers, quick_answers = delta_token_loop(*inputs)[0], delta_token_in_segments(*inputs)
    torch.testing.assert_close(quick_answers, plain_answers, atol=1e-5, rtol=1e-5)

    quick = fastest(lambda: delta_token_in_segments(*inputs).sum().backward(), 5)
    plain = fastest(lambda: delta_token_loop(*inputs)[0].sum().backward(), 2)

    # Forward alone it is about ten times as fast: the loop is then short of what PyTorch records for the gradient.
    assert plain / quick >= 10, f"{plain:.4f} s against {quick:.4f} s"


def fastest(action, times):
    durations = []
    for _ in range(times):
        start = time.process_time()
        action()
        durations.append(time.process_time() - start)
    return min(durations)


def test_feature_map_is_elu_plus_one_with_gradients_of_first_and_second_order():
    inputs = torch.tensor([-30.0, -3.0, -0.5, 0.0, 0.25, 4.0], dtype=torch.float64, requires_grad=True)

    torch.testing.assert_close(feature_map(inputs), torch.nn.functional.elu(inputs) + 1)
    assert (feature_map(inputs) > 0).all()
    without_zero = inputs.detach()[inputs.detach() != 0].requires_grad_()  # its second derivative jumps there
    assert torch.autograd.gradcheck(feature_map, without_zero)
    assert torch.autograd.gradgradcheck(feature_map, without_zero)


def test_causal_scores_leave_out_later_keys_and_have_gradients_of_first_and_second_order():
    queries = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)

    expected = (queries @ keys.mT).tril(2)

    torch.testing.assert_close(causal_scores(queries, keys), expected)
    assert torch.autograd.gradcheck(causal_scores, (queries, keys))
    assert torch.autograd.gradgradcheck(causal_scores, (queries, keys))
