"""How likely a model finds each of several answers to a prompt, each prompt from an empty state.

P: prompts. C: answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from newllm.evaluation.scoring import token_losses
from newllm.losses.next_token import NO_TARGET
from newllm.models.base import LanguageModel

MAX_ROWS = 2048  # texts read at once
Ids = Sequence[int]


@torch.inference_mode()
def answer_scores(model: LanguageModel, prompts: Sequence[Ids], answers: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return log p of every answer after every prompt (nats), and whether each of its tokens is the likeliest one, both [P, C].

    Args:
        model: any language model.
        prompts: token ids, at least one each.
        answers: token ids, at least one each.
    """
    nats = torch.zeros(len(prompts), len(answers), dtype=torch.float64)
    is_likeliest = torch.zeros(len(prompts), len(answers), dtype=torch.bool)
    for columns in _by_length(answers, len(answers)):
        chosen = _tensor(model, [answers[column] for column in columns])
        for rows in _by_length(prompts, max(1, MAX_ROWS // len(columns))):
            found = _score(model, _tensor(model, [prompts[row] for row in rows]), chosen)
            place = torch.tensor(rows)[:, None], torch.tensor(columns)
            nats[place], is_likeliest[place] = (part.cpu() for part in found)
    return -nats, is_likeliest


@torch.inference_mode()
def sentence_losses(model: LanguageModel, sentences: Sequence[Ids], *, eos_id: int) -> list[float]:
    """Return the mean nats per token of each sentence, its first token not counted; each is read after an end of text."""
    losses = [0.0] * len(sentences)
    for rows in _by_length(sentences, MAX_ROWS):
        ids = _tensor(model, [[eos_id, *sentences[row]] for row in rows])
        labels = ids[:, 1:].clone()
        labels[:, 0] = NO_TARGET
        nats, _ = token_losses(model, model.exact(ids[:, :-1]).hidden, labels)
        for row, loss in zip(rows, (nats.sum(dim=1) / (labels.shape[1] - 1)).tolist(), strict=True):
            losses[row] = loss
    return losses


def _score(model: LanguageModel, prompts_PT: Tensor, answers_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of answers of one length after prompts of one length, and whether they are the likeliest, both [P, C]."""
    num_prompts, num_answers = len(prompts_PT), len(answers_CN)
    read = model.exact(prompts_PT)
    hidden = read.hidden[:, -1:].repeat_interleave(num_answers, dim=0)  # [P, 1, D] -> [P*C, 1, D]
    answers = answers_CN.repeat(num_prompts, 1)  # [C, N] -> [P*C, N]
    if answers.shape[1] > 1:
        # The prompt is read once; every answer goes on from a copy of its state.
        state = read.state.select([row for row in range(num_prompts) for _ in range(num_answers)])
        hidden = torch.cat([hidden, model.exact(answers[:, :-1], state).hidden], dim=1)
    nats, correct = token_losses(model, hidden, answers)
    return nats.sum(dim=1).view(num_prompts, -1), correct.all(dim=1).view(num_prompts, -1)


def _by_length(texts: Sequence[Ids], most: int) -> Iterator[list[int]]:
    """Yield places of texts of equal length, at most so many at once."""
    for length in sorted({len(text) for text in texts}):
        places = [place for place, text in enumerate(texts) if len(text) == length]
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _tensor(model: LanguageModel, rows: Sequence[Ids]) -> Tensor:
    return torch.tensor([list(row) for row in rows], device=next(model.parameters()).device)
