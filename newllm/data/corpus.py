"""The path of a text: source -> documents -> split -> tokenizer -> streams of ids on disk -> blocks and facts."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.blocks import Blocks, count_blocks, count_used_tokens
from newllm.data.document import Source
from newllm.data.prepared import PreparedData
from newllm.data.spelling import bytes_that_count, text_of
from newllm.data.split_rule import SplitRule
from newllm.data.streams import SPLITS, open_streams, open_tokenizer
from newllm.data.text_statistics import bigram_entropy, count_tokens, cross_entropy, unseen_share
from newllm.data.token_cache import CachedFolder
from newllm.data.tokenizer import Tokenizer

LISTED_DOCUMENTS = 100  # held-out documents named in the facts; the cache's meta.json names all


@dataclass(frozen=True)
class UsedPart:
    """The part of one split's stream that its blocks cover; nothing else of the split counts.

    Attributes:
        blocks: the samples.
        targets: the used stream without its first token, which no block predicts.
        target_counts: how often each id is a target [V].
        documents: records of the documents of which at least one token is used.
        facts: counts; bytes are None where tokens do not spell the text.
    """

    blocks: Blocks
    targets: np.ndarray
    target_counts: np.ndarray
    documents: list[dict[str, Any]]
    facts: dict[str, int | None]


def use_part(
    cached: CachedFolder, split: str, tokenizer: Tokenizer, data: DataConfig, *, spells_text: bool
) -> UsedPart:
    """Return what a split gives at this block length and limit."""
    limit = {"train": data.max_train_blocks, "validation": data.max_validation_blocks}.get(split)
    stream = cached.ids(f"{split}.bin")
    num_blocks = count_blocks(len(stream), data.block_length, max_blocks=limit)
    num_used = count_used_tokens(num_blocks, data.block_length)
    records = cached.meta["documents"][split]
    starts = accumulate((record["tokens"] for record in records), initial=0)
    documents = [record for record, start in zip(records, starts, strict=False) if start < num_used]
    targets = stream[1:num_used]
    target_counts = count_tokens(targets, tokenizer.vocab_size)
    facts = {
        "documents": len(documents),
        "documents_left_out": len(records) - len(documents),
        "blocks": num_blocks,
        "tokens": num_used,
        "tokens_left_out": len(stream) - num_used,
        "targets": len(targets),
        "bytes": int(target_counts @ tokenizer.token_bytes) if spells_text else None,
    }
    blocks = Blocks(stream, block_length=data.block_length, num_blocks=num_blocks, eos_id=tokenizer.eos_id)
    return UsedPart(blocks, targets, target_counts, documents, facts)


def prepare_text(
    source: Source,
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    rule: SplitRule,
) -> PreparedData:
    """Return a source of text as blocks of tokens, with all that is known about them.

    Args:
        source: where the documents come from.
        data: block length, limits, shares, cache.
        tokenizer_config: which tokenizer; one that must be trained sees training text only.
        rule: which documents train, validate and test.
    Raises:
        ValueError: a document cannot be read, the text is too short, or validation holds too many unseen tokens.
    """
    tokenizer = open_tokenizer(source, rule, tokenizer_config, cache_dir=data.cache_dir)
    cached = open_streams(source, rule, tokenizer, cache_dir=data.cache_dir)
    return described(cached, source.name, data, tokenizer, tokenizer_config)


def described(
    cached: CachedFolder, name: str, data: DataConfig, tokenizer: Tokenizer, tokenizer_config: TokenizerConfig
) -> PreparedData:
    """Return cached streams as blocks of tokens, with all that is known about them.

    Raises:
        ValueError: the text is too short, or validation holds too many unseen tokens.
    """
    warn_if_smaller(tokenizer, tokenizer_config)
    why_no_bits = cached.meta["why_no_bits_per_byte"]
    spells_text = why_no_bits is None
    parts = {split: use_part(cached, split, tokenizer, data, spells_text=spells_text) for split in SPLITS}
    train, held_out = parts["train"], parts["validation"]
    _check_length(name, parts, data)
    share = unseen_share(held_out.target_counts, train.target_counts)
    check_unseen(share, data)
    facts = {
        "kind": data.kind,
        "source": name,
        "targets_are_next_tokens": True,
        "split_rule": cached.meta["rule"],
        "splits": {split: part.facts for split, part in parts.items()},
        "validation_documents": [record["id"] for record in held_out.documents[:LISTED_DOCUMENTS]],
        "test_documents": [record["id"] for record in parts["test"].documents[:LISTED_DOCUMENTS]],
        "skipped": cached.meta["skipped"],
        "parts": cached.meta["parts"],
        "unseen_share": share,
        **_entropies(train, held_out, tokenizer),
        "why_no_bits_per_byte": why_no_bits,
        "tokenizer": _tokenizer_facts(cached, tokenizer, tokenizer_config),
        "cache": {"path": str(cached.path), "rebuilt_because": cached.rebuilt_because},
    }
    return PreparedData(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        token_bytes=bytes_that_count(tokenizer, why_not=why_no_bits),
        train=train.blocks,
        validation=held_out.blocks,
        test=parts["test"].blocks,
        train_document_hashes=frozenset(record["hash"] for record in train.documents),
        validation_document_hashes=frozenset(record["hash"] for record in held_out.documents),
        fingerprint=_fingerprint(cached, parts, tokenizer, data),
        facts=facts,
        targets_are_next_tokens=True,
        validation_text=partial(text_of, held_out.targets, tokenizer) if spells_text else None,
    )


def _entropies(train: UsedPart, held_out: UsedPart, tokenizer: Tokenizer) -> dict[str, float | None]:
    nats, counted = cross_entropy(held_out.target_counts, train.target_counts), held_out.facts["bytes"]
    return {
        "unigram_nats_per_token": nats,
        "unigram_bits_per_byte": nats * len(held_out.targets) / np.log(2).item() / counted if counted else None,
        "floor_nats_per_token": bigram_entropy(train.targets, tokenizer.vocab_size),
    }


def _tokenizer_facts(cached: CachedFolder, tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, Any]:
    num_tokens = sum(record["tokens"] for rows in cached.meta["documents"].values() for record in rows)
    return {
        "kind": config.kind,
        "vocab_size": tokenizer.vocab_size,
        "asked_vocab_size": config.vocab_size,
        "tokens_per_second": num_tokens / max(cached.meta["tokenize_seconds"], 1e-9),
    }


def _fingerprint(cached: CachedFolder, parts: dict[str, UsedPart], tokenizer: Tokenizer, data: DataConfig) -> str:
    described = {
        "streams": {name: file["sha256"] for name, file in cached.files.items()},
        "blocks": {split: len(part.blocks) for split, part in parts.items()},
        "block_length": data.block_length,
        "tokens": [text.hex() for text in tokenizer.token_texts],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def warn_if_smaller(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Warn where the training text gave fewer tokens than were asked for."""
    if config.vocab_size is not None and tokenizer.vocab_size < config.vocab_size:
        warnings.warn(
            f"tokenizer.vocab_size={config.vocab_size}: the training text has pairs for {tokenizer.vocab_size} tokens "
            "only; that is the vocabulary of this run.",
            stacklevel=3,
        )


def _check_length(name: str, parts: dict[str, UsedPart], data: DataConfig) -> None:
    for split in ("train", "validation"):
        if parts[split].facts["blocks"] == 0:
            raise ValueError(
                f"{name}: its {split} text has {parts[split].facts['tokens_left_out']} tokens, fewer than one "
                f"block. Allowed: at least {data.block_length + 1}, which is data.block_length + 1. "
                "Lower data.block_length, change data.validation_share or give more text."
            )


def check_unseen(share: float, data: DataConfig) -> None:
    """Refuse validation text of which more than data.max_unseen never occurs in training.

    Raises:
        ValueError: the share is too large.
    """
    if share > data.max_unseen:
        raise ValueError(
            f"data.max_unseen={data.max_unseen}: {share:.4f} of the validation tokens have an id that never occurs in "
            f"training. Allowed: at most {data.max_unseen}. Train on more text, or lower tokenizer.vocab_size, "
            "or raise data.max_unseen."
        )
