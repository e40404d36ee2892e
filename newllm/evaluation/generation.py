"""Text the model writes, token by token from its state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from newllm.config.fields import Count, Range
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
        """Return what is wrong between these values."""
        if self.temperature > 0 or self.samples == 1:
            return []
        return [
            f"evaluation.generation.temperature={self.temperature:g}: draws nothing, and "
            f"evaluation.generation.samples={self.samples} would be the same text each time. Allowed: a temperature above 0, "
            "or one sample. Raise the temperature or set samples to 1."
        ]


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has a line without text.
    """
    where = f"evaluation.generation.prompts_file={path}"
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}). Allowed: a text file. Check the path.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}). Allowed: UTF-8. "
            "Convert the file, for example with iconv -t UTF-8."
        ) from None
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"{where}: line {number} is empty. Allowed: a prompt on every line. Take the line out.")
    return prompts


def measure(material: Material, options: GenerationConfig) -> list[dict[str, Any]]:
    """Return texts the model writes, with how much each repeats itself.

    Args:
        material: model and tokenizer.
        options: prompts and sampling.
    Raises:
        ValueError: a prompt is empty or longer than the model can take, or the run has no tokenizer.
    """
    tokenizer = material.tokenizer
    if tokenizer is None:
        raise ValueError(
            "evaluation.generation: the run's data are token ids, not text. Allowed: runs on text. Leave generation out."
        )
    prompts = [options.prompt] if options.prompts_file is None else read_prompts(options.prompts_file)
    encoded = [_encoded(tokenizer, prompt, material.model.max_positions, options.new_tokens) for prompt in prompts]
    texts = [
        text
        for prompt, ids in zip(prompts, encoded, strict=True)
        for text in _written(material, tokenizer, prompt, ids, options)
    ]
    if options.output is not None:
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        _write(Path(options.output), "".join(f"{line}\n" for line in lines))
    return texts


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


def _encoded(tokenizer: Tokenizer, prompt: str, max_positions: int | None, new_tokens: int) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("evaluation.generation.prompt: is empty. Allowed: at least one token of text. Give a prompt.")
    read = len(ids) + new_tokens - 1  # the last token is written and not read
    if max_positions is not None and read > max_positions:
        raise ValueError(
            f"evaluation.generation.prompt: its {len(ids)} tokens and evaluation.generation.new_tokens={new_tokens} need "
            f"{read} positions, the model has {max_positions}. Allowed: prompts of up to "
            f"{max(0, max_positions - new_tokens + 1)} tokens here. Shorten the prompt or lower new_tokens."
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
