"""The reversal curse: what a model that knows facts in one direction says in the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from newllm.config.fields import Range, Share
from newllm.config.schema import EvaluationConfig
from newllm.data.facts import Direction, Fact
from newllm.data.reversal import facts_of
from newllm.data.tokenizer import Tokenizer
from newllm.evaluation.answers import answer_scores, sentence_losses
from newllm.evaluation.material import Material


@dataclass(frozen=True, kw_only=True)
class ReversalConfig(EvaluationConfig):
    """When the other direction is worth a number.

    Attributes:
        forward_exact_match: share of facts answered exactly in the trained direction above which the other one is told.
        seed: of the wrong answers that right ones are compared with.
    """

    forward_exact_match: Share
    seed: Annotated[int, Range(minimum=0)]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the measurement and the data."""
        if config.data.kind == "reversal":
            return []
        return [
            f"evaluation=[reversal]: asks for facts, data of kind {config.data.kind} hold none in two directions. "
            "Allowed with it: data=reversal. Leave reversal out of the list."
        ]


@dataclass(frozen=True)
class Answers:
    """What a model says to the sentences of a direction, one entry per fact.

    Attributes:
        is_exact: every token of the right entity is the likeliest.
        reciprocal_rank: one over the place of the right entity among all of its kind, the likeliest first; the mean over the
            places that it shares with others found equally likely.
        margin: log p of the right entity less that of a random other one of its kind, nats.
        candidates: entities of its kind.
    """

    is_exact: list[bool]
    reciprocal_rank: list[float]
    margin: list[float]
    candidates: list[int]

    def figures(self) -> dict[str, Any]:
        """Return their means, what guessing would reach, and a paired test of right against random entities."""
        return {
            "exact_match": fmean(self.is_exact),
            "mean_reciprocal_rank": fmean(self.reciprocal_rank),
            "chance_exact_match": fmean(1 / count for count in self.candidates),
            "chance_mean_reciprocal_rank": fmean(mean_reciprocal(1, count) for count in self.candidates),
            "margin_nats": fmean(self.margin),
            "p_value": paired_p_value(self.margin),
        }


def measure(material: Material, options: ReversalConfig) -> dict[str, Any]:
    """Return what is known of the facts in both directions, apart for those trained in one and in both.

    Each sentence is read after an end of text from an empty state; only the entity it ends with is scored. What was trained is asked
    for in the words of training, so that a wrong answer backward is not one of who never learnt the fact.

    Args:
        material: model and facts.
        options: the gate.
    Returns:
        `one_way` and `both_ways`, where there are such facts: `facts` (how many), `forward` and `backward` with `exact_match` (share),
        `mean_reciprocal_rank` among the entities of the group that are of the same kind, both also by chance, `margin_nats` (log p of
        the right entity less that of a random one of its kind) and its `p_value`; `forward_reworded`, the same in the template that
        the fact left out of training; `forward_perplexity`, `backward_perplexity` (exp of
        the mean over sentences of nats per token) and their `gap`. Below the gate `backward`, its perplexity and the gap are a
        sentence that says so.
    Raises:
        ValueError: the tokenizer joins an entity with the text before it.
    """
    assert material.tokenizer is not None, "facts are text"
    facts = facts_of(material.data.data_config)  # type: ignore[arg-type]  # the schema of data=reversal; the data are those trained on
    found: dict[str, Any] = {}
    for name, is_both in (("one_way", False), ("both_ways", True)):
        group = [fact for fact in facts if fact.both_ways == is_both]
        if group:
            found[name] = _measure_group(material, material.tokenizer, group, options)
    return found


def mean_reciprocal(first: int, last: int) -> float:
    """Return the mean of 1 / place over the places from the first to the last, both included."""
    return fmean(1 / place for place in range(first, last + 1))


def reciprocal_ranks(scores_CC: Tensor) -> list[float]:
    """Return `Answers.reciprocal_rank` of the answers on the diagonal, each among those of its row.

    Placed first among equals, a model that tells no answer from another would seem to know nearly all.
    """
    right = scores_CC.diagonal()[:, None]
    first = (scores_CC > right).sum(dim=1) + 1
    last = (~(scores_CC < right)).sum(dim=1)  # NaN is equal to all
    return [mean_reciprocal(*places) for places in zip(first.tolist(), last.tolist(), strict=True)]


def paired_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired t-test: how likely so large a mean difference is, if the true one is 0."""
    from scipy.stats import ttest_1samp

    if np.ptp(differences) == 0:  # no spread to test against
        return 1.0 if differences[0] == 0 else 0.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def _measure_group(
    material: Material, tokenizer: Tokenizer, facts: list[Fact], options: ReversalConfig
) -> dict[str, Any]:
    found: dict[str, Any] = {"facts": len(facts)}
    forward = _answers(material, tokenizer, facts, "forward", options.seed).figures()
    reworded = _answers(material, tokenizer, facts, "forward", options.seed, reworded=True).figures()
    found |= {"forward": forward, "forward_reworded": reworded}
    found["forward_perplexity"] = _perplexity(material, tokenizer, facts, "forward")
    if forward["exact_match"] <= options.forward_exact_match:
        reason = (
            f"not told: forward exact match {forward['exact_match']:.3f} is not above {options.forward_exact_match}"
        )
        return found | {"backward": reason, "backward_perplexity": reason, "gap": reason}
    backward = _perplexity(material, tokenizer, facts, "backward")
    return found | {
        "backward": _answers(material, tokenizer, facts, "backward", options.seed).figures(),
        "backward_perplexity": backward,
        "gap": backward - found["forward_perplexity"],
    }


def _perplexity(material: Material, tokenizer: Tokenizer, facts: list[Fact], direction: Direction) -> float:
    sentences = [tokenizer.encode(fact.asked(direction)) for fact in facts]
    loss = fmean(sentence_losses(material.model, sentences, eos_id=tokenizer.eos_id))
    return math.exp(loss) if loss < 700 else math.inf


def _answers(
    material: Material,
    tokenizer: Tokenizer,
    facts: list[Fact],
    direction: Direction,
    seed: int,
    *,
    reworded: bool = False,
) -> Answers:
    found = Answers([], [], [], [])
    generator = np.random.default_rng(seed)
    for relation in dict.fromkeys(fact.relation for fact in facts):
        asked = [fact for fact in facts if fact.relation == relation]
        entities = [fact.answer(direction) for fact in asked]  # each belongs to one fact
        sentences = [fact.reworded(direction) if reworded else fact.asked(direction) for fact in asked]
        pairs = [_divided(tokenizer, *pair) for pair in zip(sentences, entities, strict=True)]
        prompts = [[tokenizer.eos_id, *prompt] for prompt, _ in pairs]
        scores, is_likeliest = answer_scores(material.model, prompts, [answer for _, answer in pairs])
        right = scores.diagonal()
        count = len(entities)
        others = (np.arange(count) + generator.integers(1, count, size=count)) % count  # any but the right one
        found.is_exact.extend(is_likeliest.diagonal().tolist())
        found.reciprocal_rank.extend(reciprocal_ranks(scores))
        found.margin.extend((right - scores[range(count), others]).tolist())
        found.candidates.extend([count] * count)
    return found


def _divided(tokenizer: Tokenizer, sentence: str, entity: str) -> tuple[list[int], list[int]]:
    """Token ids of the sentence up to the entity that it ends with, and of the entity."""
    prompt, answer = tokenizer.encode(sentence.removesuffix(f" {entity}")), tokenizer.encode(f" {entity}")
    if prompt + answer != tokenizer.encode(sentence):
        raise ValueError(
            f"evaluation.reversal: the tokenizer joins {entity} with the text before it. Allowed: tokenizers that divide "
            "text at spaces. Train with tokenizer=bpe or tokenizer=bytes."
        )
    return prompt, answer
