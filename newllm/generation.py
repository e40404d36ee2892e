"""Text that a model writes: one token after another from its state, the same steps that exact evaluation makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_type_hints

import torch
from torch import Tensor

from newllm.config.fields import Count, Range, allowed, convert
from newllm.data.tokenizer import Tokenizer
from newllm.models.base import LanguageModel, ModelOutput


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: tokens kept, the likeliest ones; null keeps all.
        top_p: smallest set of likeliest tokens with this probability; 1 keeps all.
        min_p: tokens kept have at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already there; 1 changes nothing.
        no_repeat_ngram_size: n-grams of this size never come twice; 0 allows them.
    """

    temperature: Annotated[float, Range(minimum=0)] = 0.7
    top_k: Count | None = 40
    top_p: Annotated[float, Range(above=0, maximum=1)] = 0.85
    min_p: Annotated[float, Range(minimum=0, maximum=1)] = 0.0
    repetition_penalty: Annotated[float, Range(above=0)] = 1.1
    no_repeat_ngram_size: Annotated[int, Range(minimum=0)] = 3

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SamplingOptions, include_extras=True).items():
            value = getattr(self, name)
            try:
                convert(value, hint)
            except ValueError as error:
                raise ValueError(
                    f"{name}={value}: {error}. Allowed: {allowed(hint)}. Set {name} to one of these."
                ) from None


GREEDY = SamplingOptions(
    temperature=0.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0
)


class Stepwise(Protocol):
    """What `generate` needs of a model."""

    def exact(self, input_ids: Tensor, state: Any) -> ModelOutput: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        token_ids: new tokens [B, N]; after an end of text the row repeats that token.
        state: the model's state after all tokens but the last, which it has not read.
    """

    token_ids: Tensor
    state: Any


@torch.no_grad()  # of tensors of inference mode the state could not go on into training
def generate(
    model: Stepwise,
    input_ids: Tensor,
    state: Any = None,
    *,
    max_new_tokens: int,
    options: SamplingOptions = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
) -> Generation:
    """Return the continuation of a prompt, made stepwise from the model's state.

    Args:
        model: any language model.
        input_ids: prompts [B, T] of equal length.
        state: what the model has read before the prompt; None for nothing.
        max_new_tokens: most tokens to write.
        options: how tokens are drawn.
        eos_id: token that ends a row; None never ends one.
        seed: of the draws; the same seed gives the same text.
    Raises:
        ValueError: an empty prompt, or no token to write.
    Source: the arithmetic of the options is transformers' LogitsProcessor classes.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"prompt: has token shape {list(input_ids.shape)}. Allowed: at least one token. Give a text to continue."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: writes nothing. Allowed: 1 or more. Raise it.")
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    processors = _processors(options)
    seen = input_ids
    is_done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    output = model.exact(input_ids, state)
    for written in range(1, max_new_tokens + 1):
        scores = processors(seen, model.logits(output.hidden[:, -1]).float())
        token = _draw(scores, options, generator)
        if eos_id is not None:
            token = token.masked_fill(is_done, eos_id)
            is_done |= token == eos_id
        seen = torch.cat([seen, token.unsqueeze(1)], dim=1)
        if written == max_new_tokens or bool(is_done.all()):
            break
        output = model.exact(token.unsqueeze(1), output.state)
    return Generation(seen[:, input_ids.shape[1] :], output.state)


def sample_texts(
    model: LanguageModel, tokenizer: Tokenizer, prompt_ids: Tensor, *, max_new_tokens: int, seed: int
) -> list[str]:
    """Return each prompt [B, T] with its continuation, as text, the two parted by ` | `."""
    prompts = prompt_ids.to(next(model.parameters()).device)
    written = generate(
        model, prompts, max_new_tokens=max_new_tokens, options=SamplingOptions(), eos_id=tokenizer.eos_id, seed=seed
    )
    pairs = zip(prompts.tolist(), written.token_ids.tolist(), strict=True)
    return [f"{tokenizer.decode(prompt)} | {tokenizer.decode(new)}" for prompt, new in pairs]


def repetition(token_ids: list[int], *, size: int = 4) -> dict[str, float]:
    """Return how much a text repeats itself.

    Args:
        token_ids: the text.
        size: of the n-grams whose repeats are counted, tokens.
    Returns:
        `repeated_4grams`, by their size: share of n-grams that came before; `distinct_1`, `distinct_2`: distinct n-grams over all n-grams.
    """

    def ngrams(length: int) -> Counter:
        return Counter(zip(*(token_ids[start:] for start in range(length)), strict=False))

    def distinct(length: int) -> float:
        counted = ngrams(length)
        return len(counted) / max(counted.total(), 1)

    counted = ngrams(size)
    repeated = (counted.total() - len(counted)) / max(counted.total(), 1)
    return {f"repeated_{size}grams": repeated, "distinct_1": distinct(1), "distinct_2": distinct(2)}


def _processors(options: SamplingOptions) -> Any:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found: list[Any] = []
    if options.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        found.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0:
        found.append(MinPLogitsWarper(options.min_p))
    return LogitsProcessorList(found)


def _draw(scores_BV: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    if not scores_BV.max(dim=-1).values.isfinite().all():
        raise ValueError(
            f"no_repeat_ngram_size={options.no_repeat_ngram_size}: forbids every token, or the logits are not finite. "
            "Allowed: a size that leaves a token to write. Raise it, or set it to 0."
        )
    if options.temperature == 0:
        return scores_BV.argmax(dim=-1)
    return torch.multinomial(torch.softmax(scores_BV, dim=-1), 1, generator=generator).squeeze(1)
