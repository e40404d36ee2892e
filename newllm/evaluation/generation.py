"""Text the model writes, token by token from its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.material import Material
from newllm.generation import SamplingOptions, generate, repetition


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(EvaluationConfig):
    """Prompt and sampling."""

    prompt: str
    new_tokens: Count
    samples: Count  # texts
    temperature: Annotated[float, Range(minimum=0)]  # 0 takes the likeliest token
    top_k: Count | None  # tokens kept, the likeliest ones; null keeps all
    top_p: Annotated[float, Range(above=0, maximum=1)]  # smallest set of tokens with this probability
    min_p: Annotated[float, Range(minimum=0, maximum=1)]  # least share of the likeliest token's probability
    repetition_penalty: Annotated[float, Range(above=0)]  # 1 changes nothing
    no_repeat_ngram_size: Annotated[int, Range(minimum=0)]  # 0 allows repeats
    seed: Annotated[int, Range(minimum=0)]


def measure(material: Material, options: GenerationConfig) -> list[dict[str, Any]]:
    """Return texts the model writes, with how much each repeats itself.

    Args:
        material: model and tokenizer.
        options: prompt and sampling.
    Raises:
        ValueError: the prompt is empty, or the run has no tokenizer.
    """
    if material.tokenizer is None:
        raise ValueError(
            "evaluation.generation: the run's data are token ids, not text. Allowed: runs on text. Leave generation out."
        )
    prompt = material.tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("evaluation.generation.prompt: is empty. Allowed: at least one token of text. Give a prompt.")
    sampling = SamplingOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
    )
    prompts = torch.tensor([prompt], device=material.device)
    texts = []
    for sample in range(options.samples):
        written = (
            generate(
                material.model,
                prompts,
                max_new_tokens=options.new_tokens,
                options=sampling,
                eos_id=material.tokenizer.eos_id,
                seed=options.seed + sample,
            )
            .token_ids[0]
            .tolist()
        )
        texts.append({"text": options.prompt + material.tokenizer.decode(written), **repetition(written)})
    return texts
