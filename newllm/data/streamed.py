"""A corpus that is streamed: its head is read and kept for validation, statistics and the tokenizer; training reads on.

documents   t v t t t x t ...      v validates, x tests, whatever is far behind; t trains
head        until there are max_validation_blocks of each, and sample_characters of training text
training    all t from the beginning on, again and again; nothing is kept
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from newllm.config.corpus_data import CorpusConfig
from newllm.config.schema import TokenizerConfig
from newllm.data.corpus import described
from newllm.data.document import Document, Source, read_source
from newllm.data.document_stream import DocumentStream
from newllm.data.prepared import PreparedData
from newllm.data.records import RecordForm
from newllm.data.split import Split
from newllm.data.split_rule import INDEX_RANGE, split_rule
from newllm.data.streamed_blocks import TextStream
from newllm.data.streams import TOKENIZER_FILE, write_split
from newllm.data.text_files import content_hash, find_files, read_files
from newllm.data.token_cache import CachedFolder, open_or_build
from newllm.data.tokenizer import Tokenizer, load_tokenizer
from newllm.data.tokenizer_kinds import describe_training, ready_tokenizer, train_tokenizer

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class StreamRule:
    """A way to split documents one by one, without knowing the others.

    Attributes:
        validation_share: of the documents, by hash of their ids.
        test_share: of the documents, by hash of their ids.
        first: number of the first document that validates, and with `last`, the one after the last; None: no range.
        held_out: gives the validation documents of a source of their own; None where the stream has them.
        signature: plain values that differ whenever the split may differ.
    """

    validation_share: float
    test_share: float
    signature: dict[str, Any]
    first: int | None = None
    last: int = 0
    held_out: Callable[[], list[Document]] | None = None
    words: str = "hash of the document id"

    def part_of(self, document: Document, number: int | None = None) -> Part:
        """Return what a document is for; without its number in the corpus, ranges are not looked at."""
        if self.first is not None and number is not None and self.first <= number < self.last:
            return "validation"
        place = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8]) / 2**64
        if place < self.validation_share:
            return "validation"
        return "test" if place < self.validation_share + self.test_share else "train"


def stream_rule(validation: str | None, data: CorpusConfig, *, form: RecordForm) -> StreamRule:
    """Return the rule that the configuration asks for.

    Args:
        validation: null (by hash), "first:last" (documents of the stream, last excluded), or a file of its own.
        data: the shares.
        form: of the records of a validation file.
    Raises:
        ValueError: the value is none of these.
    """
    signature = split_rule(validation, data, form=form).signature  # refuses what is none of these
    if validation is None:
        return StreamRule(data.validation_share, data.test_share, signature)
    if (indices := INDEX_RANGE.fullmatch(validation)) is not None:
        first, last = int(indices[1]), int(indices[2])
        return StreamRule(0.0, data.test_share, signature, first, last, words=f"documents {validation}")
    files, _ = find_files(validation, key="data.validation")
    name = f"data.validation={validation}"
    source = Source(name, {"sha256": content_hash(files)}, partial(read_files, files, form, "validation", 0))
    return stream_rule_by_source(source, data)


def stream_rule_by_source(validation: Source, data: CorpusConfig) -> StreamRule:
    """Return the rule that validates on a source of its own."""
    signature = {"rule": "source", "validation": validation.signature, "test_share": data.test_share}

    def held_out() -> list[Document]:
        return read_source(validation).documents

    return StreamRule(0.0, data.test_share, signature, held_out=held_out, words=f"validation {validation.name}")


@dataclass
class Head:
    """The documents of the beginning of a stream, by purpose; no text twice in what is held out, none of it in `train`."""

    rule: StreamRule
    sample_characters: int
    train: list[Document] = field(default_factory=list)
    held_out: dict[Part, dict[str, Document]] = field(default_factory=lambda: {"validation": {}, "test": {}})
    missing_tokens: dict[Part, int] = field(default_factory=dict)
    num_characters: int = 0

    def is_complete(self, number: int) -> bool:
        """Return whether nothing is missing after so many documents."""
        has_sample = self.num_characters >= self.sample_characters
        return has_sample and number >= self.rule.last and all(left <= 0 for left in self.missing_tokens.values())

    def add(self, document: Document, number: int, count_tokens: Callable[[Document], int]) -> None:
        """Take a document that is wanted, by its place in the stream."""
        part = self.rule.part_of(document, number)
        if part == "train":
            if self.num_characters < self.sample_characters:
                self.train.append(document)
                self.num_characters += len(document.text)
            return
        is_known = any(document.text_hash in documents for documents in self.held_out.values())
        is_wanted = self.missing_tokens[part] > 0 or (part == "validation" and self.rule.first is not None)
        if is_wanted and not is_known:
            self.held_out[part][document.text_hash] = document
            self.missing_tokens[part] -= count_tokens(document)

    def split(self) -> Split:
        """Return the documents; a training text that is held out too is left out."""
        hashes = {text for documents in self.held_out.values() for text in documents}
        train = list({d.text_hash: d for d in self.train if d.text_hash not in hashes}.values())
        validation, test = (list(self.held_out[part].values()) for part in ("validation", "test"))
        return Split(train, validation, test, f"streamed: {self.rule.words}")


def read_head(
    stream: DocumentStream, rule: StreamRule, data: CorpusConfig, count_tokens: Callable[[Document], int]
) -> tuple[Split, dict[str, int]]:
    """Return the documents of the beginning of the stream, and how many were skipped for which reason.

    Raises:
        ValueError: there is no text, or fewer documents than data.validation asks for.
    """
    assert data.max_validation_blocks is not None, "the configuration refuses streaming without it"
    wanted = data.max_validation_blocks * data.block_length + 1
    head = Head(rule, data.sample_characters)
    if rule.held_out is not None:
        head.held_out["validation"] = {document.text_hash: document for document in rule.held_out()}
    head.missing_tokens = {
        "validation": wanted if rule.validation_share > 0 else 0,  # a range or a source says itself how much
        "test": wanted if rule.test_share > 0 else 0,
    }
    skipped: Counter[str] = Counter()
    number = 0
    for number, document in enumerate(stream.documents(skipped), start=1):
        head.add(document, number - 1, count_tokens)
        if head.is_complete(number):
            break
    if number == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "none at all"
        raise ValueError(
            f"{stream.name}: holds no document with text (skipped: {reasons}). Allowed: at least one. Check data.path."
        )
    if number < rule.last:
        raise ValueError(
            f"data.validation={rule.first}:{rule.last}: asks for more validation documents than the source's {number} "
            f"allow. Allowed: a range within 0:{number} that leaves at least one. Choose a smaller range."
        )
    return head.split(), dict(sorted(skipped.items()))


def prepare_streamed(
    stream: DocumentStream, data: CorpusConfig, tokenizer_config: TokenizerConfig, rule: StreamRule
) -> PreparedData:
    """Return a corpus whose training text is streamed; `train` are the blocks of its head, for statistics alone.

    Args:
        stream: the corpus.
        data: block length, limits, cache.
        tokenizer_config: which tokenizer; one that must be trained sees training text of the head only.
        rule: which documents train, validate and test.
    Raises:
        ValueError: a document cannot be read, the text is too short, or validation holds too many unseen tokens.
    """
    tokenizer = ready_tokenizer(tokenizer_config) or _trained_tokenizer(stream, data, tokenizer_config, rule)
    cached = _open_head(stream, data, tokenizer, rule)
    prepared = described(cached, stream.name, data, tokenizer, tokenizer_config)
    hashes = {split: {row["hash"] for row in cached.meta["documents"][split]} for split in ("validation", "test")}
    text = TextStream(
        documents=stream,
        tokenizer=tokenizer,
        is_training=_Training(rule, frozenset(hashes["validation"] | hashes["test"])),
        block_length=data.block_length,
        buffer_characters=data.shuffle_buffer,
    )
    described_by = f"{prepared.fingerprint} {cached.path.name} streamed with data.shuffle_buffer={data.shuffle_buffer}"
    return dataclasses.replace(
        prepared,
        stream=text,
        fingerprint=hashlib.sha256(described_by.encode()).hexdigest(),
        facts={**prepared.facts, "streaming": True},
    )


@dataclass(frozen=True)
class _Training:
    """Whether a document may be trained on."""

    rule: StreamRule
    held_out_hashes: frozenset[str]

    def __call__(self, document: Document) -> bool:
        return self.rule.part_of(document) == "train" and document.text_hash not in self.held_out_hashes


def _trained_tokenizer(
    stream: DocumentStream, data: CorpusConfig, config: TokenizerConfig, rule: StreamRule
) -> Tokenizer:
    def train(folder: Path) -> dict[str, Any]:
        split, _ = read_head(stream, rule, data, _count_bytes)
        train_tokenizer(config, (document.text for document in split.train)).save(folder / TOKENIZER_FILE)
        return {}

    key = {**_key(stream, data, rule), "training": describe_training(config)}
    return load_tokenizer(open_or_build(data.cache_dir, key, train).path / TOKENIZER_FILE)


def _count_bytes(document: Document) -> int:
    """Return how many tokens the text has at most: what is too few of them leaves too few documents out of training."""
    return document.num_bytes


def _open_head(stream: DocumentStream, data: CorpusConfig, tokenizer: Tokenizer, rule: StreamRule) -> CachedFolder:
    def write(folder: Path) -> dict[str, Any]:
        split, skipped = read_head(stream, rule, data, lambda document: len(tokenizer.encode(document.text)) + 1)
        return write_split(folder, split, skipped, tokenizer)

    described_tokenizer = {"json": tokenizer.to_json(), "vocab_size": tokenizer.vocab_size}
    return open_or_build(data.cache_dir, {**_key(stream, data, rule), "tokenizer": described_tokenizer}, write)


def _key(stream: DocumentStream, data: CorpusConfig, rule: StreamRule) -> dict[str, Any]:
    limits = {name: getattr(data, name) for name in ("max_validation_blocks", "block_length", "sample_characters")}
    return {"streamed": stream.signature, "split": rule.signature, **limits}
