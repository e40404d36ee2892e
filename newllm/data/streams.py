"""Documents to streams of ids on disk: each split one file, EOS after each document."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from newllm.config.schema import TokenizerConfig
from newllm.data.document import Document, Source, read_source
from newllm.data.spelling import why_no_bits_per_byte
from newllm.data.split import Split
from newllm.data.split_rule import SplitRule
from newllm.data.token_cache import CachedFolder, open_or_build
from newllm.data.tokenizer import Tokenizer, load_tokenizer
from newllm.data.tokenizer_kinds import describe_training, ready_tokenizer, train_tokenizer

SPLITS = ("train", "validation", "test")
TOKENIZE_CHARACTERS = 1 << 19  # texts tokenised at once: all threads are busy; the library needs 100 bytes for each
TOKENIZER_FILE = "tokenizer.json"


def open_tokenizer(source: Source, rule: SplitRule, config: TokenizerConfig, *, cache_dir: str) -> Tokenizer:
    """Return the tokenizer of a configuration; one that must be trained sees training text only, and is cached.

    Training unigram pieces twice gives two tokenizers (sums in another order), so a run keeps its own.
    """
    ready = ready_tokenizer(config)
    if ready is not None:
        return ready

    def train(folder: Path) -> dict[str, Any]:
        split = rule.apply(read_source(source).documents)
        train_tokenizer(config, (document.text for document in split.train)).save(folder / TOKENIZER_FILE)
        return {}

    key = {"source": source.key, "split": rule.signature, "training": describe_training(config)}
    return load_tokenizer(open_or_build(cache_dir, key, train).path / TOKENIZER_FILE)


def open_streams(source: Source, rule: SplitRule, tokenizer: Tokenizer, *, cache_dir: str) -> CachedFolder:
    """Return the cached streams `train.bin`, `validation.bin`, `test.bin` of a source.

    The cache is named by the tokenizer itself, not by how it came about: a run's saved tokenizer finds the run's cache.
    Its meta holds: dtype, skipped (by reason), parts (documents of each part of the source), rule (words), tokenize_seconds,
    for each split the documents in order, each with id, hash, bytes and tokens, and why the held-out ones have no bits per byte.
    """
    described = {"json": tokenizer.to_json(), "vocab_size": tokenizer.vocab_size}
    key = {"source": source.key, "split": rule.signature, "tokenizer": described}
    return open_or_build(cache_dir, key, partial(_write_streams, source, rule, tokenizer))


def _write_streams(source: Source, rule: SplitRule, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    reading = read_source(source)
    return write_split(folder, rule.apply(reading.documents), reading.skipped, tokenizer)


def write_split(folder: Path, split: Split, skipped: dict[str, int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `train.bin`, `validation.bin` and `test.bin` and return what is recorded of them."""
    parts = (split.train, split.validation, split.test)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    start = time.perf_counter()
    documents = {
        name: write_stream(folder / f"{name}.bin", part, tokenizer, dtype)
        for name, part in zip(SPLITS, parts, strict=True)
    }
    tokenize_seconds = time.perf_counter() - start
    held_out = (
        text
        for name, part in zip(SPLITS[1:], parts[1:], strict=True)
        for text in _read_back(folder / f"{name}.bin", part, documents[name], dtype)
    )
    return {
        "dtype": dtype.name,
        "skipped": skipped,
        "parts": dict(sorted(Counter(document.source for part in parts for document in part).items())),
        "rule": split.rule,
        "tokenize_seconds": tokenize_seconds,
        "documents": documents,
        "why_no_bits_per_byte": why_no_bits_per_byte(held_out, tokenizer),
    }


def _read_back(
    path: Path, documents: list[Document], rows: list[dict[str, Any]], dtype: np.dtype
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield the documents of a stream with their ids, without EOS."""
    ends = np.cumsum([row["tokens"] for row in rows], dtype=np.int64)
    for document, ids in zip(documents, np.split(np.fromfile(path, dtype), ends), strict=False):
        yield document, ids[:-1]


def write_stream(path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: np.dtype) -> list[dict[str, Any]]:
    """Write the ids of the documents, EOS after each, and return what is recorded of them."""
    rows = []
    with path.open("wb") as file, _progress(path.stem, documents) as progress:
        for document, ids in encode_documents(documents, tokenizer):
            np.append(ids, tokenizer.eos_id).astype(dtype).tofile(file)
            rows.append(_record(document, num_tokens=len(ids) + 1))
            progress.update(len(document.text))
    return rows


def encode_documents(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document with its ids, without EOS; several threads share the work.

    Raises:
        ValueError: a text cannot be encoded, or holds what the tokenizer reads as the end of a text.
    """
    for group in _groups(documents):
        for document, ids in zip(group, _encode(group, tokenizer), strict=True):
            _check_no_end(document, ids, tokenizer)
            yield document, ids


def _progress(name: str, documents: list[Document]) -> "tqdm[NoReturn]":
    """Return a bar over the characters of the documents, on a terminal, for work of more than a few seconds."""
    total = sum(len(document.text) for document in documents)
    label = f"tokenising {name}"
    return tqdm(total=total, desc=label, unit=" characters", unit_scale=True, delay=2, disable=None, leave=False)


def _encode(group: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([document.text for document in group])
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer: cannot encode one of the texts from {group[0].id} to {group[-1].id} ({error}). "
            "Allowed: a vocabulary for every character. Choose tokenizer=bpe or tokenizer=bytes."
        ) from error


def _check_no_end(document: Document, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    if (ids == tokenizer.eos_id).any():
        name = tokenizer.decode([tokenizer.eos_id])
        raise ValueError(
            f"{document.id}: its text holds {name}, which this tokenizer reads as the end of a text. "
            f"Allowed: texts without {name}. Take it out, or choose tokenizer=bpe."
        )


def _record(document: Document, *, num_tokens: int) -> dict[str, Any]:
    return {
        "id": document.id,
        "hash": document.text_hash,
        "bytes": document.num_bytes,
        "tokens": num_tokens,
    }


def _groups(documents: list[Document]) -> Iterator[list[Document]]:
    """Yield consecutive documents that together are about TOKENIZE_CHARACTERS long."""
    group: list[Document] = []
    num_characters = 0
    for document in documents:
        group.append(document)
        num_characters += len(document.text)
        if num_characters >= TOKENIZE_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group
