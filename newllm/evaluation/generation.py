"""Text the model writes, token by token from its state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from newllm.config.fields import Count, Range
from newllm.config.prompts import output_problems, prompt_problems, read_prompts
from newllm.config.schema import EvaluationConfig
from newllm.data.tokenizer import Tokenizer
from newllm.evaluation.material import Material
from newllm.generation import SamplingOptions, generate, repetition
from newllm.whole_file import write_whole


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(EvaluationConfig):
    """Prompts and sampling."""

    prompt: str
    prompts_file: str | None  # UTF-8, one prompt a line; null takes `prompt`
    output: str | None  # file for the texts, one JSON object a line; null writes them to evaluation.json only
    new_tokens: Count
    samples: Count  # texts of each prompt
    temperature: Annotated[float, Range(minimum=0)]  # 0 takes the likeliest token
    top_k: Count | None  # tokens kept, the likeliest ones; null keeps all
    top_p: Annotated[float, Range(above=0, maximum=1)]  # smallest set of tokens with this probability
    min_p: Annotated[float, Range(minimum=0, maximum=1)]  # least share of the likeliest token's probability
    repetition_penalty: Annotated[float, Range(above=0)]  # 1 changes nothing
    no_repeat_ngram_size: Annotated[int, Range(minimum=0)]  # 0 allows repeats
    seed: Annotated[int, Range(minimum=0)]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between these values, with the files they name, and with the data: before anything is trained."""
        problems = [*prompt_problems(self.prompt, self.prompts_file), *output_problems(self.output)]
        if not config.data.needs_tokenizer:
            problems.append(
                f"evaluation=[generation]: writes text, data={config.data.kind} gives token ids. Allowed: runs on text. "
                "Leave generation out of the list."
            )
        positions = getattr(config.model, "max_positions", None)
        if positions is not None and self.new_tokens > positions:
            problems.append(
                f"evaluation.generation.new_tokens={self.new_tokens}: is more than model.max_positions={positions}. "
                f"Allowed: 1 to {positions}, with a prompt of one token. Lower it."
            )
        if self.temperature == 0 and self.samples > 1:
            problems.append(
                f"evaluation.generation.temperature={self.temperature:g}: draws nothing, and "
                f"evaluation.generation.samples={self.samples} would be the same text each time. Allowed: a temperature above 0, "
                "or one sample. Raise the temperature or set samples to 1."
            )
        return problems


def measure(material: Material, options: GenerationConfig) -> list[dict[str, Any]]:
    """Return texts the model writes, with how much each repeats itself.

    Args:
        material: model and tokenizer.
        options: prompts and sampling.
    Raises:
        ValueError: a prompt is empty or longer than the model can take.
    """
    tokenizer = material.tokenizer
    assert tokenizer is not None, "the configuration refuses generation on data that are no text"
    longest = material.model.max_positions
    # All are looked at before the first is continued.
    encoded = [(prompt, _encoded(tokenizer, where, prompt, longest, options)) for where, prompt in _prompts(options)]
    texts = [text for prompt, ids in encoded for text in _written(material, tokenizer, prompt, ids, options)]
    if options.output is not None:
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        _write(Path(options.output), "".join(f"{line}\n" for line in lines))
    return texts


def _prompts(options: GenerationConfig) -> list[tuple[str, str]]:
    """Where each prompt stands, in words, and the prompt."""
    if options.prompts_file is None:
        return [("evaluation.generation.prompt", options.prompt)]
    lines = enumerate(read_prompts(options.prompts_file), start=1)
    return [(f"evaluation.generation.prompts_file={options.prompts_file}: line {place}", text) for place, text in lines]


def _written(
    material: Material, tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], options: GenerationConfig
) -> list[dict[str, Any]]:
    sampling = SamplingOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
    )
    texts = []
    for seed in range(options.seed, options.seed + options.samples):
        written = generate(
            material.model,
            torch.tensor([prompt_ids], device=material.device),
            max_new_tokens=options.new_tokens,
            options=sampling,
            eos_id=tokenizer.eos_id,
            seed=seed,
        )
        new_ids = written.token_ids[0].tolist()
        text = prompt + tokenizer.decode(new_ids)
        texts.append({"prompt": prompt, "seed": seed, "text": text, "new_tokens": len(new_ids), **repetition(new_ids)})
    return texts


def _encoded(
    tokenizer: Tokenizer, where: str, prompt: str, max_positions: int | None, options: GenerationConfig
) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"{where}: is empty. Allowed: at least one token of text. Give a prompt.")
    read = len(ids) + options.new_tokens - 1  # the last token is written and not read
    if max_positions is not None and read > max_positions:
        raise ValueError(
            f"{where}: its {len(ids)} tokens and evaluation.generation.new_tokens={options.new_tokens} need "
            f"{read} positions, the model has {max_positions}. Allowed: prompts of up to "
            f"{max(0, max_positions - options.new_tokens + 1)} tokens here. Shorten the prompt or lower new_tokens."
        )
    return ids


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ValueError(
            f"evaluation.generation.output={path}: cannot be written ({error.strerror}). Allowed: a file in a folder that "
            "takes files. Name another."
        ) from None
