"""The selective model: slots as defined, one State per level, the plain model with one step."""

import math

import pytest
import torch
from small_selective import (
    DIM,
    HEADS,
    SEGMENT,
    SEVERAL_MEMORIES,
    STACKS,
    VOCABULARY,
    layer,
    selective,
    tokens,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from newllm.layers.pythia import PythiaConfig, PythiaLayer
from newllm.layers.rotary import rotate
from newllm.models.base import count_parameters
from newllm.models.selective import SelectiveConfig, SelectiveLM
from newllm.models.transformer import TransformerLM

STEPS = [{"skip_interval": s, "attend": a} for s in (2, 3) for a in ("all_lower", "same_level")]
OTHERS = [
    {"skip_interval": 2, "carry": "identity"},
    {"skip_interval": 2, "carry": "injection"},
    {"skip_interval": 3, "carry": "pause"},
    {"skip_interval": 3, "halting": "learned", "halting_threshold": 0.4},
]
EVERY = [(stack, options) for stack in STACKS for options in [*STEPS, *OTHERS]]
IDS = [f"{stack}-{'-'.join(str(value) for value in options.values())}" for stack, options in EVERY]
# fp32 sums of some tens of terms, in another order.
TOLERANCE = 1e-5


def in_calls(model, input_ids, length):
    state = model.initial_state(input_ids.shape[0])
    logits = []
    for call in input_ids.split(length, dim=1):
        output = model(call, state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize(("stack", "options"), EVERY, ids=IDS)
@pytest.mark.parametrize("length", [1, 2, SEGMENT, SEGMENT + 1])
def test_calls_of_any_length_equal_one_pass(stack, options, length):
    model, input_ids = selective(stack, **options), tokens(2, 3 * SEGMENT + 2)

    with torch.no_grad():
        whole = model(input_ids).logits
        cut, _ = in_calls(model, input_ids, length)

    torch.testing.assert_close(cut, whole, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("stack", [*STACKS, *SEVERAL_MEMORIES])
@pytest.mark.parametrize("steps", [2, 3])
def test_generated_logits_equal_teacher_forced_ones(stack, steps):
    model, prompt = selective(stack, skip_interval=steps), tokens(1, 4)
    generated, seen = [], prompt

    with torch.no_grad():
        output = model(prompt)
        for _ in range(7):
            generated.append(output.logits[:, -1])
            seen = torch.cat([seen, output.logits[:, -1:].argmax(-1)], dim=1)
            output = model(seen[:, -1:], output.state)
        forced = model(seen).logits[:, prompt.shape[1] - 1 : -1]

    torch.testing.assert_close(torch.stack(generated, dim=1), forced, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stack", "options"), EVERY, ids=IDS)
def test_later_tokens_change_nothing_before_them(stack, options):
    model, input_ids = selective(stack, **options), tokens(1, 2 * SEGMENT + 2)
    with torch.no_grad():
        before = model(input_ids).logits
        for position in range(1, input_ids.shape[1]):
            changed = torch.cat([input_ids[:, :position], (input_ids[:, position:] + 1) % VOCABULARY], dim=1)

            after = model(changed).logits

            torch.testing.assert_close(after[:, :position], before[:, :position], atol=TOLERANCE, rtol=TOLERANCE)
            assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@pytest.mark.parametrize("attend", ["all_lower", "same_level"])
def test_rows_that_were_reset_read_as_fresh_texts(attend):
    model = selective("window", skip_interval=2, attend=attend)
    first, second = tokens(3, 5), tokens(3, 6, seed=1)
    with torch.no_grad():
        state = model(first).state

        together = model(second, state.reset([False, True, False])).logits

        torch.testing.assert_close(together[1:2], model(second[1:2]).logits, atol=TOLERANCE, rtol=TOLERANCE)
        kept = model(second[[0, 2]], state.select([0, 2])).logits
        torch.testing.assert_close(together[[0, 2]], kept, atol=TOLERANCE, rtol=TOLERANCE)


def slot_by_slot(model, input_ids, attends_lower):
    """Every slot alone: its keys are a plain list of the slots it may see, nothing is masked."""
    block, levels, seen = model.layers[0], [], []
    for level in range(model.skip_interval):
        starts = model.embedding(input_ids[0]) if level == 0 else model.carry_projection(levels[-1])
        fused = block.query_key_value(block.attention_norm(starts)).unflatten(-1, (HEADS, -1))
        queries, keys, values = fused.chunk(3, dim=-1)  # [T, H, d]
        seen.append((keys, values))
        outputs = []
        for t in range(input_ids.shape[1]):
            visible = range(level + 1) if attends_lower else [level]
            slots = [(time, below) for time in range(t + 1) for below in visible]
            turned = [turn(seen[below][0][time], time) for time, below in slots]
            scores = torch.stack([(turn(queries[t], t) * key).sum(-1) for key in turned]) / math.sqrt(DIM / HEADS)
            weighted = torch.stack([seen[below][1][time] for time, below in slots]) * scores.softmax(0).unsqueeze(-1)
            outputs.append(block.output(weighted.sum(0).flatten()))
        levels.append(starts + torch.stack(outputs) + block.mlp(block.mlp_norm(starts)))
    return model.logits(levels[-1])


def turn(heads_Hd, position):
    return rotate(heads_Hd[None, :, None], offset=position, rotary_dim=2, base=10000.0)[0, :, 0]


@pytest.mark.parametrize("attend", ["all_lower", "same_level"])
def test_a_slot_attends_to_lower_levels_at_tokens_up_to_its_own(attend):
    model = selective("pythia", skip_interval=3, attend=attend)
    del model.layers[1]
    input_ids = tokens(1, 5)

    with torch.no_grad():
        parallel = model(input_ids).logits[0]

        torch.testing.assert_close(
            parallel, slot_by_slot(model, input_ids, attend == "all_lower"), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("stack", STACKS)
def test_one_step_is_the_plain_model_bit_for_bit(stack):
    torch.manual_seed(3)
    plain = TransformerLM(VOCABULARY, DIM, [layer(kind) for kind in STACKS[stack]])
    torch.manual_seed(3)
    model = SelectiveLM(VOCABULARY, DIM, [layer(kind) for kind in STACKS[stack]], skip_interval=1)
    input_ids, labels = tokens(2, 7), tokens(2, 7, seed=1)

    outputs = [one(input_ids) for one in (plain, model)]
    for output in outputs:
        torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()).backward()

    assert torch.equal(outputs[0].logits, outputs[1].logits)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


def test_identity_at_the_same_level_is_a_deeper_stack_of_tied_weights():
    model = selective("infini", skip_interval=2, attend="same_level", carry="identity")
    deep = TransformerLM(VOCABULARY, DIM, [*model.layers, *model.layers])
    deep.embedding, deep.final_norm, deep.head = model.embedding, model.final_norm, model.head
    input_ids = tokens(2, 8)

    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, deep(input_ids).logits)


def test_injection_adds_the_tokens_embedding_to_what_is_carried():
    model = selective("pythia", skip_interval=2, attend="same_level", carry="injection")
    input_ids = tokens(2, 5)
    with torch.no_grad():
        hidden = model.embedding(input_ids)
        for _step in range(2):
            for one in model.layers:
                hidden, _ = one(hidden, one.initial_state(2, device=hidden.device, dtype=hidden.dtype))
            hidden = hidden + model.embedding(input_ids)
        last = hidden - model.embedding(input_ids)

        torch.testing.assert_close(model(input_ids).hidden, last, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_pause_step_starts_from_its_learned_vector():
    model = selective("pythia", skip_interval=2, attend="same_level", carry="pause")

    with torch.no_grad():
        logits = model(tokens(1, 5)).logits[0]

    # Pause slots that see only pause slots cannot tell tokens apart.
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), atol=TOLERANCE, rtol=TOLERANCE)


def test_published_size_adds_one_projection():
    with torch.device("meta"):
        options = PythiaConfig(kind="pythia", rotary_share=0.25, rotary_base=10000.0, window=None)
        model = SelectiveLM(50304, 512, [PythiaLayer(512, 8, 2048, options) for _ in range(6)], skip_interval=2)

    assert count_parameters(model)["total"] == 70_426_624 + 262_656


@pytest.mark.parametrize(("stack", "options"), EVERY, ids=IDS)
@pytest.mark.parametrize("length", [2, 2 * SEGMENT + 1])
def test_costs_are_those_of_the_real_tensors(stack, options, length):
    model = selective(stack, **options).requires_grad_(False)

    # The dense kernel multiplies what the formula charges; others leave parts of it out and are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(tokens(1, length))

    assert counter.get_total_flops() == pytest.approx(length * model.flops_per_token(length), rel=1e-12)
    assert output.state.nbytes == model.state_bytes(length)


def test_state_survives_a_file(tmp_path):
    model = selective("infini", skip_interval=2)
    with torch.no_grad():
        state = model(tokens(2, 5)).state
        state.save(tmp_path / "state.safetensors")

        back = model.initial_state(2).load(tmp_path / "state.safetensors")

        more = tokens(2, 3, seed=1)
        assert torch.equal(model(more, back).logits, model(more, state).logits)


def test_threshold_decides_the_emitting_step():
    model = selective("pythia", skip_interval=3, halting="learned")
    model.halting_gate.weight.data.zero_()
    model.halting_gate.bias.data.fill_(0.0)
    input_ids = tokens(2, 4)
    with torch.no_grad():
        levels = model.encode(input_ids, model.initial_state(2)).levels

    assert (model.emitting_step(levels, 0.4) == 0).all()
    assert (model.emitting_step(levels, 0.5) == 2).all()


def test_emitted_hidden_state_is_that_of_the_chosen_step():
    model = selective("pythia", skip_interval=3, halting="learned", halting_threshold=0.5)
    with torch.no_grad():
        output = model.encode(tokens(2, 9), model.initial_state(2))
        step = model.emitting_step(output.levels, 0.5)

    assert len(step.unique()) > 1, "the example must halt at different steps"
    for row in range(2):
        for t in range(9):
            assert torch.equal(output.hidden[row, t], output.levels[row, t, step[row, t]])


def config(**changes):
    values = {"dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8, "skip_interval": 2, "attend": "all_lower"}
    values |= {"carry": "projection", "halting": "fixed", "halting_threshold": 0.5}
    return SelectiveConfig(kind="selective", **{**values, **changes})


def test_configuration_names_what_is_wrong():
    assert config().check(None) == []
    assert (
        config(num_heads=3).check(None)[0].startswith("model.num_heads=3: does not divide model.dim=8. Allowed: 1, 2")
    )
    assert "leaves learned halting no step" in config(halting="learned", skip_interval=1).check(None)[0]
    assert config(halting="learned").needs_trainer == "selective"
