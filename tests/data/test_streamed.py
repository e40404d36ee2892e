"""A streamed corpus: split by document, nothing lost, nothing twice, and continued at the exact batch."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_texts import BPE, BYTES, jsonl_config, sentences, write_jsonl

from newllm.config.compose import compose
from newllm.data import file_pieces
from newllm.data.document import Document
from newllm.data.jsonl import prepare
from newllm.data.module import TextDataModule
from newllm.data.prepared import PreparedData
from newllm.data.streamed_blocks import (
    BlockReader,
    Share,
    StreamedBlocks,
    StreamLoader,
    TextStream,
    make_stream_loader,
)

KEYS: dict[str, Any] = {"streaming": True, "max_validation_blocks": 5}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", 60)


def streamed(corpus: Path, **changes: Any) -> PreparedData:
    return prepare(jsonl_config(corpus, **(KEYS | changes)), BYTES)


def stream_of(data: PreparedData) -> TextStream:
    assert data.stream is not None
    return data.stream


def loader_of(data: PreparedData, num_workers: int, **ranks: int) -> StreamLoader:
    blocks = StreamedBlocks(stream_of(data), 4, seed=1, shuffle=True, **ranks)
    return make_stream_loader(blocks, num_workers=num_workers, pin_memory=False)


def first_pass(text: TextStream, reader: int, num_readers: int) -> tuple[list[int], Counter[str]]:
    """Return the tokens that a reader gives in one pass over the corpus, block after block, and what it counted."""
    blocks = BlockReader(text, Share(reader=reader, num_readers=num_readers, batch_size=1, seed=0, shuffle=False))
    tokens = []
    while (batch := next(blocks)) and blocks.state_dict()["passes"] == 0:
        tokens += batch["labels"][0].tolist()
        counts = Counter(blocks.state_dict()["read"])
    return tokens, counts


def test_readers_share_the_training_documents_and_no_document_is_read_twice(corpus: Path, monkeypatch) -> None:
    held_out = streamed(corpus).validation_document_hashes
    for piece_bytes in (1 << 24, 700):  # fewer pieces than readers, and more
        monkeypatch.setattr(file_pieces, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(file_pieces.cut_pieces, "__defaults__", (piece_bytes,))
        text = stream_of(streamed(corpus))

        counts = [first_pass(text, reader, 3)[1] for reader in range(3)]

        total = sum(counts, Counter())
        expected = [sentences(seed) for seed in range(60)]
        trained = [t for t in text.documents.documents(Counter()) if text.is_training(t)]
        assert total["documents"] == len(trained)
        assert total["documents"] + total["skipped: held out"] == len(expected)
        assert total["tokens"] + total["tokens left out"] == sum(t.num_bytes + 1 for t in trained)
        assert held_out.isdisjoint(document.text_hash for document in trained)


def test_blocks_of_a_buffer_are_its_documents_in_a_row(corpus: Path) -> None:
    text = stream_of(streamed(corpus))

    tokens, _ = first_pass(text, 0, 1)

    trained = next(t for t in text.documents.documents(Counter()) if text.is_training(t))
    assert bytes(tokens[:100]) == trained.text.encode()[1:101]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_continues_at_the_exact_batch(corpus: Path, tmp_path: Path, num_workers: int) -> None:
    data = streamed(corpus)
    batches = iter(loader_of(data, num_workers))
    straight = [next(batches) for _ in range(430)]  # more than a pass
    for done in (1, 57, 400):
        loader = loader_of(data, num_workers)
        begun = iter(loader)
        for _ in range(done):
            next(begun)
        torch.save(loader.state_dict(), tmp_path / "state")
        resumed = loader_of(data, num_workers)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))

        continued = iter(resumed)

        for expected in straight[done : done + 30]:
            batch = next(continued)
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_another_number_of_readers_is_refused(corpus: Path) -> None:
    data = streamed(corpus)
    state = loader_of(data, 0).state_dict()

    with pytest.raises(ValueError, match=r"resume: the corpus was shared by 1 readers .* this run has 2"):
        loader_of(data, 0, world_size=2).load_state_dict(state)


def test_a_second_pass_mixes_anew(corpus: Path) -> None:
    reader = iter(StreamedBlocks(stream_of(streamed(corpus)), 4, seed=1, shuffle=True))
    passes: dict[int, list[int]] = {0: [], 1: []}
    while (batch := next(reader)) and (number := reader.state_dict()["passes"]) < 2:
        passes[number].append(tuple(batch["input_ids"].flatten().tolist()))

    assert passes[0] != passes[1]
    assert Counter(t for b in passes[0] for t in b) == Counter(t for b in passes[1] for t in b)


def test_a_part_without_a_block_is_told(tmp_path: Path) -> None:
    data = streamed(write_jsonl(tmp_path / "few.jsonl", 3), validation="0:1", test_share=0.0)

    with pytest.raises(ValueError, match=r"reader 5 of 5 finds no block of training text in its part"):
        first_pass(stream_of(data), 4, 5)


def test_validation_by_range_is_left_out_of_training(corpus: Path) -> None:
    data = streamed(corpus, validation="3:5", test_share=0.0)

    text = stream_of(data)
    left_out = [number for number, t in enumerate(text.documents.documents(Counter())) if not text.is_training(t)]

    assert left_out == [3, 4]
    assert data.facts["validation_documents"][0].startswith("corpus.jsonl@")


def test_validation_of_its_own_file_is_left_out_of_training(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"text": sentences(7)}), encoding="utf-8")
    text = stream_of(streamed(corpus, validation=str(own), test_share=0.0))

    assert not text.is_training(Document(sentences(7), "any", "jsonl"))
    assert text.is_training(Document(sentences(8), "any", "jsonl"))


def test_more_validation_documents_than_the_stream_has_are_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation=50:80: .* the source's 60 allow"):
        streamed(corpus, validation="50:80")


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")

    with pytest.raises(ValueError, match=r"holds no document with text \(skipped: 2 blank line\)"):
        streamed(tmp_path / "empty.jsonl")


def test_too_short_a_stream_is_refused(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", 4)

    with pytest.raises(ValueError, match=r"its train text has \d+ tokens, fewer than one block"):
        streamed(short, validation="0:1", block_length=4000)


def test_a_trained_tokenizer_sees_no_validation_text(corpus: Path, tmp_path: Path) -> None:
    marked = corpus.read_text(encoding="utf-8").splitlines()
    marked[2] = json.dumps({"text": "qqqqzzzz " * 40})
    corpus.write_text("\n".join(marked), encoding="utf-8")
    config = jsonl_config(corpus, **KEYS, validation="2:3")

    data = prepare(config, dataclasses.replace(BPE, vocab_size=290))

    assert data.tokenizer is not None
    assert not any(b"qq" in token for token in data.tokenizer.token_texts)


def test_what_was_read_and_skipped_is_counted(corpus: Path) -> None:
    corpus.write_text(corpus.read_text(encoding="utf-8") + '\n{"text": "  "}\n', encoding="utf-8")
    module = TextDataModule(jsonl_config(corpus, **KEYS, num_workers=2), BYTES, seed=0)
    module.prepare()
    loader = module.train_dataloader()
    batches = iter(loader)
    for _ in range(1100):  # more than a pass
        next(batches)
    loader.state_dict()

    found = module.facts["read"]

    assert found["skipped"]["empty"] >= 1
    assert found["skipped"]["blank line"] >= 1
    assert found["documents"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_validation_blocks=null"], r"data.max_validation_blocks=null: with data.streaming=true all of"),
        (["data.max_train_blocks=9"], r"data.max_train_blocks=9: data.streaming=true reads on"),
        (["trainer=streaming", "model=infini"], r"data.streaming=true: trainer=streaming must know the length"),
        (["trainer=lct", "model=infini"], r"trainer.cache=ram: keeps states for a sample's next visit"),
    ],
)
def test_choices_that_need_the_whole_corpus_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(["data=pile", "data.streaming=true", *overrides])
