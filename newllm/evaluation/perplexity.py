"""Loss, perplexity, bits per byte and accuracy over every target once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch

from newllm.config.schema import EvaluationConfig
from newllm.data.compression import compressed_bits_per_byte
from newllm.data.tokenizer import Tokenizer
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import Score, score_batch
from newllm.evaluation.streaming import stream_scores
from newllm.losses.next_token import NO_TARGET

# Perplexities of a real text under a vocabulary of some thousand tokens, and what they usually mean.
BANDS = (
    (5.0, "below 5: a leak or a mask error is likelier than a good model; stop and check"),
    (30.0, "5 to 30: over-fitting suspected; compare train/loss and val/loss"),
    (100.0, "30 to 100: what a small model reaches on little text"),
    (500.0, "100 to 500: usual early in training from scratch"),
    (1000.0, "500 to 1000: early in training"),
    (float("inf"), "above 1000: under-trained"),
)
EASY = ("reversal", "stdlib")
"""Kinds of data whose text is easier than prose: the bands say nothing about them."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(EvaluationConfig):
    """What stands beside the perplexity."""

    compare_compressors: bool  # bits per byte of xz -9 and zstd -19 on the same text


def measure(material: Material, options: PerplexityConfig) -> dict[str, Any]:
    """Return loss, perplexity, accuracy and bits per byte of the deployed function, and what they compare with.

    Args:
        material: model and text.
        options: what stands beside the numbers.
    Returns:
        `loss` (nats per token), `perplexity`, `accuracy` (share of targets), `bits_per_byte` or `why_no_bits_per_byte`, `targets`,
        `bytes`; for text also
        `xz_bits_per_byte`, `zstd_bits_per_byte` (of the same text), `unigram_bits_per_byte` (validation text under the token
        frequencies of the training text) and `band`: what such a perplexity usually means, and why.
    """
    token_bytes = material.data.token_bytes
    if material.data.in_lanes:
        scores = list(stream_scores(material))
    else:
        scores = [score_batch(material.model, batch, token_bytes) for batch in material.batches()]
    total: Score = reduce(add, scores)
    found: dict[str, Any] = {**total.metrics(), "targets": total.tokens, "bytes": total.bytes}
    if material.tokenizer is None:
        return found
    why_no_bits = material.data.facts["why_no_bits_per_byte"]
    if why_no_bits is not None:
        found |= {"bytes": None, "why_no_bits_per_byte": why_no_bits}
    elif material.split == "validation":
        found["unigram_bits_per_byte"] = material.data.facts["unigram_bits_per_byte"]
    if options.compare_compressors and why_no_bits is None:
        compressed = compressed_bits_per_byte(_text(material, material.tokenizer))
        found |= {f"{name}_bits_per_byte": value for name, value in compressed.items()}
    if material.run.config.tokenizer.kind != "bytes" and material.run.config.data.kind not in EASY:
        found["band"] = next(text for limit, text in BANDS if found["perplexity"] < limit or limit == float("inf"))
    return found


def _text(material: Material, tokenizer: Tokenizer) -> bytes:
    """The UTF-8 bytes of all targets, in order: samples are numbered as their text goes on, whichever batch they come in."""
    texts = tokenizer.token_texts
    batches = list(material.batches())
    order = torch.cat([batch["sample_id"] for batch in batches]).argsort()
    labels = torch.cat([batch["labels"] for batch in batches])[order].flatten().tolist()
    return b"".join(texts[token] for token in labels if token != NO_TARGET)
