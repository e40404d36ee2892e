"""How well a model predicts: sums over targets, made the same way in validation and in evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from newllm.losses.next_token import NO_TARGET
from newllm.models.base import LanguageModel

Mode = Literal["exact", "lagged", "no_feedback"]

# Logits of so many values at once: 256 MB in fp32, whatever batch, length and vocabulary are.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Score:
    """Sums over targets; scores of several batches add up.

    Attributes:
        nats: negative log-likelihood of the targets.
        tokens: targets.
        correct: targets that were the most likely token.
        bytes: UTF-8 bytes of the targets' text.
    """

    nats: float
    tokens: int
    correct: int
    bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.correct + other.correct,
            self.bytes + other.bytes,
        )

    def metrics(self) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy (share of targets) and, for text, bits_per_byte."""
        loss = self.nats / self.tokens
        found = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": self.correct / self.tokens,
        }
        if self.bytes > 0:
            found["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return found


@torch.inference_mode()
def hidden_states(model: LanguageModel, input_ids: Tensor, *, mode: Mode = "exact", state: Any = None) -> Tensor:
    """Return the states [B, T, D] of a text from its start.

    Args:
        model: any language model.
        input_ids: tokens [B, T].
        mode: "exact" the deployed function; "lagged" one sweep from zeros; "no_feedback" the stack without its feedback.
        state: state before the first token; None for the empty one.
    """
    if mode == "exact" or not model.has_feedback:
        return model.exact(input_ids, state).hidden
    if state is None:
        state = model.initial_state(input_ids.shape[0])
    zeros = state.hidden.new_zeros(*input_ids.shape, state.hidden.shape[-1])
    return model.encode(input_ids, state, previous_hidden=zeros, use_feedback=mode == "lagged").hidden


@torch.inference_mode()
def token_losses(model: LanguageModel, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return nats (float64, 0 without a target) and correctness of every position, both [B, T].

    Logits are made for a few positions at a time.
    """
    step = max(1, MAX_LOGITS // (hidden.shape[0] * model.vocab_size))
    nats, correct = [], []
    for start in range(0, hidden.shape[1], step):
        logits = model.logits(hidden[:, start : start + step])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, start : start + step]
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
        )
        nats.append(flat.view(targets.shape).double())
        correct.append(logits.argmax(-1) == targets)
    return torch.cat(nats, dim=1), torch.cat(correct, dim=1)


@torch.inference_mode()
def score_batch(
    model: LanguageModel, batch: dict[str, Tensor], token_bytes: Tensor | None, *, mode: Mode = "exact"
) -> Score:
    """Return the score of a batch, every block from an empty state.

    Args:
        model: any language model.
        batch: `input_ids` and `labels` [B, T]; labels of -100 are no targets.
        token_bytes: UTF-8 bytes of every token [V]; None where targets are not text.
        mode: as for `hidden_states`.
    """
    return score_states(model, hidden_states(model, batch["input_ids"], mode=mode), batch["labels"], token_bytes)


@torch.inference_mode()
def score_states(model: LanguageModel, hidden: Tensor, labels: Tensor, token_bytes: Tensor | None) -> Score:
    """Return the score of hidden states [B, T, D] against their labels [B, T]; `token_bytes` as for `score_batch`."""
    return score_of(*token_losses(model, hidden, labels), labels, token_bytes)


def score_of(nats: Tensor, correct: Tensor, labels: Tensor, token_bytes: Tensor | None) -> Score:
    """Return the score of what `token_losses` gave, or of some rows of it with their labels; `token_bytes` as for `score_batch`."""
    targets = labels[labels != NO_TARGET]
    num_bytes = 0 if token_bytes is None else int(token_bytes.to(targets.device)[targets].sum())
    return Score(float(nats.sum()), targets.numel(), int(correct.sum()), num_bytes)
