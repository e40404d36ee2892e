"""The recursive model: the recursion as defined, exact in any chunking, tied and counted once, near ln V at the start."""

import copy
import math

import pytest
import torch
from small_selective import tokens
from small_trm import DIM, POSITIONS, VOCABULARY, trm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.models.base import count_parameters
from newllm.models.trm import TrmConfig, TrmLM

SHAPES = [{}, {"latent_steps": 1, "deep_steps": 3, "supervision_steps": 1}, {"num_layers": 2, "deep_steps": 1}]
# fp32 sums of some tens of terms, in another order, over the recursion.
TOLERANCE = 1e-5


def published(vocab_size=16_000):
    sizes = {"num_layers": 1, "num_heads": 4, "mlp_dim": 1024, "max_positions": 512}
    return TrmLM(vocab_size, 256, **sizes, latent_steps=2, deep_steps=2, supervision_steps=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_calls_of_any_length_equal_one_pass(shape, length):
    model, input_ids = trm(**shape), tokens(2, 11)

    with torch.no_grad():
        whole = model(input_ids)
        state, logits = model.initial_state(2), []
        for call in input_ids.split(length, dim=1):
            output = model(call, state)
            logits.append(output.logits)
            state = output.state

    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(state.keys, whole.state.keys, atol=TOLERANCE, rtol=TOLERANCE)
    assert state.positions == whole.state.positions == (11, 11)


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_logits_equal_teacher_forced_ones(shape):
    model, seen = trm(**shape), tokens(1, 4)
    generated = []
    with torch.no_grad():
        output = model(seen)
        for _ in range(7):
            generated.append(output.logits[:, -1])
            seen = torch.cat([seen, output.logits[:, -1:].argmax(-1)], dim=1)
            output = model(seen[:, -1:], output.state)

        forced = model(seen).logits[:, 3:-1]

    torch.testing.assert_close(torch.stack(generated, dim=1), forced, atol=1e-4, rtol=1e-4)


def test_recursion_is_that_of_the_definition():
    model = trm(latent_steps=2, deep_steps=3, supervision_steps=2).double()
    input_ids = tokens(1, 5)

    def net(linear, *parts):
        block, a = model.blocks[0], linear(torch.cat(parts, dim=-1))
        queries, keys, values = block.query_key_value(a).unflatten(-1, (3, 2, DIM // 2)).unbind(2)
        scores = torch.einsum("bthd,buhd->bhtu", queries, keys) / math.sqrt(DIM / 2)
        is_later = torch.ones(5, 5).triu(diagonal=1).bool()
        shares = scores.masked_fill(is_later, -torch.inf).softmax(-1)
        a = block.attention_norm(a + block.output(torch.einsum("bhtu,buhd->bthd", shares, values).flatten(2)))
        return block.mlp_norm(a + block.mlp(a))

    with torch.no_grad():
        x = math.sqrt(DIM) * (model.embedding(input_ids) + model.position(torch.arange(5)))
        y, z = x, torch.zeros_like(x)
        answers = []
        for _supervision in range(2):
            for _cycle in range(3):
                for _latent in range(2):
                    z = net(model.latent_input, x, y, z)
                    y = net(model.answer_input, y, z)
            answers.append(y)
        output = model.encode(input_ids, model.initial_state(1))

    # float64: another order of sums shows at 1e-15 each.
    torch.testing.assert_close(output.levels, torch.stack(answers, dim=2), atol=1e-12, rtol=1e-12)
    assert torch.equal(output.hidden, output.levels[:, :, -1])
    torch.testing.assert_close(model.logits(y), y @ model.embedding.weight.T)


def last_change(model, input_ids, position):
    """Change of the logits up to a position when everything after it changes."""
    changed = torch.cat([input_ids[:, : position + 1], (input_ids[:, position + 1 :] + 1) % VOCABULARY], dim=1)
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    return (after - before)[:, : position + 1].abs().max().item()


@pytest.mark.parametrize("position", [0, 3, 7])
def test_later_tokens_change_nothing_before_them(position):
    assert last_change(trm(), tokens(2, 9), position) < TOLERANCE


def test_attention_to_the_future_is_caught(monkeypatch):
    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))

    assert last_change(trm(), tokens(2, 9), 3) > 1e-2


def test_gradient_reaches_back_one_cycle():
    model, input_ids = trm(deep_steps=2, supervision_steps=2), tokens(1, 5)

    def gradient(unrolled, level):
        levels = model.refine(input_ids, model.initial_state(1), unrolled=unrolled).levels
        return torch.autograd.grad(levels[:, :, level].square().sum(), model.latent_input.weight)[0]

    def by_hand(level):
        """The last cycle of a supervision step alone, from the answers and latents before it."""
        x = math.sqrt(DIM) * (model.embedding(input_ids) + model.position(torch.arange(5)))
        y, z = x, torch.zeros_like(x)
        nothing = torch.zeros(1, 2, 0, DIM // 2)

        def cycle(y, z):
            for _ in range(2):
                z = model.blocks[0](model.latent_input(torch.cat([x, y, z], -1)), nothing, nothing)[0]
                y = model.blocks[0](model.answer_input(torch.cat([y, z], -1)), nothing, nothing)[0]
            return y, z

        with torch.no_grad():
            for _ in range(2 * level + 1):
                y, z = cycle(y, z)
        return torch.autograd.grad(cycle(y, z)[0].square().sum(), model.latent_input.weight)[0]

    for level in (0, 1):
        torch.testing.assert_close(gradient(False, level), by_hand(level), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(gradient(True, level), by_hand(level), rtol=1e-2)


def test_rows_that_were_reset_read_as_fresh_texts():
    model, first, second = trm(), tokens(3, 5), tokens(3, 6, seed=1)
    with torch.no_grad():
        state = model(first).state

        together = model(second, state.reset([False, True, False]))

        torch.testing.assert_close(together.logits[1:2], model(second[1:2]).logits, atol=TOLERANCE, rtol=TOLERANCE)
        kept = model(second[[0, 2]], state.select([0, 2])).logits
        torch.testing.assert_close(together.logits[[0, 2]], kept, atol=TOLERANCE, rtol=TOLERANCE)
    assert together.state.positions == (11, 6, 11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 7])
def test_costs_are_those_of_the_real_tensors(shape, length):
    model = trm(**shape).requires_grad_(False)

    # The dense kernel multiplies what the formula charges; others leave parts of it out and are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(tokens(1, length))

    assert counter.get_total_flops() == pytest.approx(length * model.flops_per_token(length), rel=1e-12)
    assert output.state.nbytes == model.state_bytes(length)


def test_published_size_is_counted_once():
    counted = count_parameters(published())

    network = 256 * (3 * 256 + 1) + 256 * (2 * 256 + 1) + 4 * 256 * 257 + 2 * 4 * 256**2 + 5 * 256 + 4 * 256
    assert counted["total"] == 4_096_000 + 131_072 + network + 257 == 5_345_281  # 5.35 M
    assert counted["shared"] == [["embedding.weight", "head.weight"]]


def test_a_head_of_its_own_is_counted_and_seen():
    model = published()
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())

    counted = count_parameters(model)

    assert counted["total"] == 5_345_281 + 4_096_000
    assert counted["shared"] == []


def test_weights_stay_tied_through_copies_and_dtypes():
    for model in (copy.deepcopy(trm()), trm().double()):
        model.load_state_dict(trm(stirred=1.0).state_dict())
        assert model.head.weight is model.embedding.weight


def test_first_loss_is_near_ln_v():
    torch.manual_seed(0)
    model = published()
    input_ids = torch.randint(16_000, (2, 33))

    with torch.no_grad():
        logits = model(input_ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).item()

    assert 0.95 * math.log(16_000) < loss < 1.05 * math.log(16_000)


def test_an_unscaled_embedding_starts_far_above_ln_v():
    torch.manual_seed(0)
    model = published()
    model.embedding.weight.data.normal_()
    input_ids = torch.randint(16_000, (2, 33))

    with torch.no_grad():
        logits = model(input_ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).item()

    assert loss > 1.3 * math.log(16_000)


def test_a_text_beyond_the_positions_is_refused():
    model = trm()
    with torch.no_grad():
        state = model(tokens(2, POSITIONS - 1)).state

    with pytest.raises(ValueError, match="input_ids: reach 17 tokens, the model has positions for 16"):
        model(tokens(2, 2), state)


def test_heads_must_divide_the_width():
    sizes = {"num_layers": 1, "mlp_dim": 8, "max_positions": 8, "latent_steps": 1, "deep_steps": 1}
    config = TrmConfig(kind="trm", dim=8, num_heads=3, supervision_steps=1, **sizes)

    assert config.check(None)[0].startswith("model.num_heads=3: does not divide model.dim=8. Allowed: 1, 2, 4, 8.")
