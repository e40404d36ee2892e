"""What measurements work on, without a run folder: a model, batches, and what they ask of a run."""

from types import SimpleNamespace
from typing import Any

import torch
from small_sessions import model, tokenizer
from torch import Tensor

from newllm.data.tokenizer import Tokenizer
from newllm.models.base import LanguageModel

BLOCK = 9


def batches(*, sizes: tuple[int, ...] = (2, 1), block: int = BLOCK, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return blocks of one random text, which follow each other, in batches of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, 200, (sum(sizes) * block + 1,), generator=generator)
    inputs, labels = stream[:-1].view(-1, block), stream[1:].view(-1, block)
    sample_ids = torch.arange(sum(sizes))
    return [
        {"input_ids": ids, "labels": targets, "sample_id": numbers}
        for ids, targets, numbers in zip(inputs.split(sizes), labels.split(sizes), sample_ids.split(sizes), strict=True)
    ]


def material(
    found: LanguageModel | None = None, *, text: list[dict[str, Tensor]] | None = None, own: Tokenizer | None = None
) -> Any:
    """Return the material of a model on such batches."""
    found = model(feedback="additive") if found is None else found
    text = batches() if text is None else text
    own = tokenizer() if own is None else own
    config = SimpleNamespace(
        data=SimpleNamespace(block_length=text[0]["labels"].shape[1], kind="jsonl"),
        tokenizer=SimpleNamespace(kind="bpe"),
    )
    data = SimpleNamespace(
        token_bytes=torch.from_numpy(own.token_bytes),
        facts={"unigram_bits_per_byte": 2.5, "why_no_bits_per_byte": None},
        targets_are_next_tokens=True,
        in_lanes=False,
    )
    return SimpleNamespace(
        model=found,
        tokenizer=own,
        data=data,
        split="validation",
        run=SimpleNamespace(config=config),
        device=torch.device("cpu"),
        batches=lambda: iter(text),
    )
