"""Text written token by token from the state."""

import itertools
from typing import Any

import pytest
import torch
from small_sessions import model

from newllm.generation import GREEDY, SamplingOptions, generate, repetition

PROMPTS = torch.tensor([[5, 9, 3], [7, 7, 200]])
PLAIN: dict[str, Any] = {
    "top_k": None,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@pytest.mark.parametrize("feedback", ["none", "additive", "gated"])
@pytest.mark.parametrize("stack", ["pythia pythia", "infini pythia", "infini infini"])
def test_stepwise_logits_equal_those_of_the_whole_prefix(stack, feedback):
    found = model(stack, feedback=feedback)
    logits = []
    found.head.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    # More new tokens than segments are long, so that memory is written on the way.
    ids = generate(found, PROMPTS, max_new_tokens=7).token_ids
    stepwise = torch.stack(logits, dim=1)

    with torch.no_grad():
        whole = found(torch.cat([PROMPTS, ids[:, :-1]], dim=1)).logits[:, 2:]

    torch.testing.assert_close(stepwise, whole, atol=1e-4, rtol=0)
    assert torch.equal(ids, whole.argmax(-1))


def test_generation_goes_on_from_a_state():
    found = model("infini pythia", feedback="additive")
    whole = generate(found, PROMPTS, max_new_tokens=6).token_ids
    with torch.no_grad():
        state = found(PROMPTS[:, :2]).state

    later = generate(found, PROMPTS[:, 2:], state, max_new_tokens=6).token_ids

    assert torch.equal(later, whole)


def test_returned_state_continues_the_text():
    found = model("infini pythia")
    whole = generate(found, PROMPTS, max_new_tokens=6).token_ids
    first = generate(found, PROMPTS, max_new_tokens=2)

    rest = generate(found, first.token_ids[:, -1:], first.state, max_new_tokens=4).token_ids

    assert torch.equal(rest, whole[:, 2:])


def test_same_seed_draws_the_same_text_whatever_was_drawn_before():
    found, options = model(), SamplingOptions(temperature=1.5)
    first = generate(found, PROMPTS, max_new_tokens=5, options=options, seed=3).token_ids
    torch.rand(7)

    assert torch.equal(generate(found, PROMPTS, max_new_tokens=5, options=options, seed=3).token_ids, first)
    assert not torch.equal(generate(found, PROMPTS, max_new_tokens=5, options=options, seed=4).token_ids, first)


def test_end_of_text_ends_a_row():
    found = model()
    first = generate(found, PROMPTS, max_new_tokens=8).token_ids
    eos_id = int(first[0, 2])
    end = first[0].tolist().index(eos_id)

    rows = generate(found, PROMPTS[:1], max_new_tokens=8, eos_id=eos_id).token_ids

    assert rows.tolist() == [first[0, : end + 1].tolist()]


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}],
    ids=lambda change: next(iter(change)),
)
def test_narrowest_choice_is_the_likeliest_token(narrow):
    found = model()
    options = SamplingOptions(**{**PLAIN, "temperature": 1.0, **narrow})

    drawn = generate(found, PROMPTS, max_new_tokens=5, options=options).token_ids

    assert torch.equal(drawn, generate(found, PROMPTS, max_new_tokens=5, options=GREEDY).token_ids)


def test_no_ngram_comes_twice_prompt_included():
    found = model()
    found.head.weight.data[:] = 0  # every token is as likely: the likeliest is always the same one
    options = SamplingOptions(**{**PLAIN, "temperature": 0.0, "no_repeat_ngram_size": 2})

    written = generate(found, PROMPTS[:1], max_new_tokens=12, options=options).token_ids[0].tolist()

    text = PROMPTS[0].tolist() + written
    pairs = list(itertools.pairwise(text))
    assert len(set(pairs)) == len(pairs)


def test_repetition_penalty_moves_away_from_what_was_there():
    found = model()
    found.head.weight.data[:] = 0
    options = SamplingOptions(**{**PLAIN, "temperature": 0.0, "repetition_penalty": 5.0})
    found.final_norm.bias.data.fill_(1.0)
    found.head.weight.data[5] = 0.1  # in the prompt, and likeliest
    found.head.weight.data[6] = 0.09

    assert generate(found, PROMPTS[:1], max_new_tokens=1).token_ids.item() == 5
    assert generate(found, PROMPTS[:1], max_new_tokens=1, options=options).token_ids.item() == 6


@pytest.mark.parametrize("shape", [(1, 0), (3,)])
def test_empty_prompt_is_refused(shape):
    with pytest.raises(ValueError, match=r"prompt: .*at least one token"):
        generate(model(), torch.zeros(shape, dtype=torch.int64), max_new_tokens=3)


def test_no_token_to_write_is_refused():
    with pytest.raises(ValueError, match=r"max_new_tokens=0: writes nothing"):
        generate(model(), PROMPTS, max_new_tokens=0)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("temperature", -0.1, "at least 0"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.5, "above 0, at most 1"),
        ("top_k", 0, "at least 1"),
        ("min_p", 2.0, "at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("no_repeat_ngram_size", -1, "at least 0"),
    ],
)
def test_options_out_of_range_are_refused(option, value, told):
    with pytest.raises(ValueError, match=rf"{option}={value}: is out of range\. Allowed: .*{told}"):
        SamplingOptions(**{option: value})


def test_forbidding_every_token_is_refused():
    found = model()
    options = SamplingOptions(**{**PLAIN, "temperature": 0.0, "no_repeat_ngram_size": 1})

    with pytest.raises(ValueError, match=r"no_repeat_ngram_size=1: forbids every token"):
        generate(found, PROMPTS[:1], max_new_tokens=300, options=options)


def test_repetition_by_hand():
    # 4-grams 1231, 2312, 3123, 1231: one of four came before.
    found = repetition([1, 2, 3, 1, 2, 3, 1])

    assert found == {"repeated_4grams": 0.25, "distinct_1": 3 / 7, "distinct_2": 3 / 6}
    assert repetition([]) == {"repeated_4grams": 0.0, "distinct_1": 0.0, "distinct_2": 0.0}


def test_the_state_after_generation_goes_on_into_training():
    found = model("infini pythia", feedback="additive")
    written = generate(found, PROMPTS, max_new_tokens=3)

    found(written.token_ids[:, -1:], written.state).logits.sum().backward()

    assert found.head.weight.grad is not None
