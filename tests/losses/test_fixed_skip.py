"""Fixed skip: no target among the inputs, every token a target once, the plain loss with one step."""

import pytest
import torch
from small_selective import selective, tokens

from newllm.losses.fixed_skip import (
    FixedSkipConfig,
    FixedSkipLoss,
    Steps,
    check_steps,
    count_leaks,
    interleaved_steps,
)
from newllm.losses.next_token import NO_TARGET, NextTokenConfig, NextTokenLoss

LOSS = FixedSkipLoss(FixedSkipConfig(kind="fixed_skip"))
NEXT_TOKEN = NextTokenLoss(NextTokenConfig(kind="next_token"))


def advancing_inputs(length, skip_interval):
    """The unsound definition: every step reads a token, the k-th output is to predict token k + 2."""
    step = torch.arange(length)
    emits = step % skip_interval == 0
    return Steps(step, torch.where(emits, step // skip_interval + 2, NO_TARGET))


@pytest.mark.parametrize(("skip_interval", "leaks"), [(2, 62), (3, 42), (4, 31)])
def test_advancing_inputs_are_caught(skip_interval, leaks):
    steps = advancing_inputs(128, skip_interval)

    assert count_leaks(steps) == leaks  # counted by hand in an early prototype: 62 of 64 at two steps
    with pytest.raises(AssertionError, match=f"{leaks} of .* targets are among the tokens already read"):
        check_steps(steps, 128)


def test_a_token_that_is_never_a_target_is_caught():
    steps = interleaved_steps(5, 2)
    target = torch.where(steps.target == 3, NO_TARGET, steps.target)

    with pytest.raises(AssertionError, match="4 targets over 5 tokens: every token must be a target exactly once"):
        check_steps(Steps(steps.last_read, target), 5)


def test_steps_of_a_short_text():
    steps = interleaved_steps(3, 2)

    check_steps(steps, 3)
    assert steps.last_read.tolist() == [0, 0, 1, 1, 2, 2]
    assert steps.target.tolist() == [NO_TARGET, 1, NO_TARGET, 2, NO_TARGET, 3]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_loss_is_the_next_token_loss_of_the_emitted_states(steps):
    model, input_ids, labels = selective("pythia", skip_interval=steps), tokens(2, 5), tokens(2, 5, seed=1)
    labels[1, 3] = NO_TARGET
    output = model.encode(input_ids, model.initial_state(2))

    assert torch.equal(LOSS(model, output.levels, labels), NEXT_TOKEN(model, output.hidden, labels))


def test_carry_over_steps_have_no_loss_of_their_own():
    model, labels = selective("pythia", skip_interval=3), tokens(2, 5, seed=1)
    levels = model.encode(tokens(2, 5), model.initial_state(2)).levels.detach()
    other = levels.clone()
    other[:, :, :-1] = 0

    assert torch.equal(LOSS(model, levels, labels), LOSS(model, other, labels))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_statistics_are_the_shares_of_steps(steps):
    levels = torch.zeros(2, 5, steps, 8)

    found = LOSS.statistics(None, levels, None)

    assert found["selective/output_ratio"] == pytest.approx(1 / steps)
    assert found["selective/carry_over_ratio"] == pytest.approx(1 - 1 / steps)
