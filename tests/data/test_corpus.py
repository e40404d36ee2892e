import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from small_texts import BPE, BYTES, prepared, sentences, write_jsonl
from tokenizers import models, normalizers

from newllm.config.schema import TokenizerConfig
from newllm.data.blocks import Blocks
from newllm.data.tokenizer_kinds import saved_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl")


def all_labels(samples: Blocks) -> list[int]:
    return samples.__getitems__(range(len(samples)))["labels"].flatten().tolist()


def test_blocks_hold_the_texts_one_after_the_other_with_an_end_after_each(corpus: Path) -> None:
    data = prepared(corpus, block_length=1)  # one target each, so that no tail is left out

    stream = [int(data.prepared.train.stream[0]), *all_labels(data.prepared.train)]

    texts = bytes(token if token != 256 else 0 for token in stream).decode().rstrip("\0").split("\0")
    assert len(texts) == data.facts["splits"]["train"]["documents"] == 8
    assert set(texts) <= {sentences(seed) for seed in range(12)}


def test_splits_share_no_text(corpus: Path) -> None:
    data = prepared(corpus)

    assert len(data.train_document_hashes) == 8
    assert len(data.validation_document_hashes) == 2
    assert not data.train_document_hashes & data.validation_document_hashes


def test_only_the_used_part_counts(corpus: Path) -> None:
    whole, part = prepared(corpus), prepared(corpus, max_train_blocks=20, max_validation_blocks=2)

    # 140 of the training bytes: one document and a part of the next, none of which is as short as 100 bytes
    assert part.facts["splits"]["train"]["documents"] == len(part.train_document_hashes) == 1
    assert part.train_document_hashes < whole.train_document_hashes
    assert part.facts["splits"]["train"]["tokens"] == 20 * 7 + 1
    assert part.facts["splits"]["train"]["documents_left_out"] == 7
    assert part.num_validation_samples == 2
    assert part.facts["unigram_nats_per_token"] != whole.facts["unigram_nats_per_token"]
    assert part.fingerprint != whole.fingerprint
    assert part.facts["cache"]["path"] == whole.facts["cache"]["path"]


def test_facts_count_every_token_and_byte(corpus: Path) -> None:
    splits = prepared(corpus).facts["splits"]

    for counts in splits.values():
        assert counts["targets"] == counts["blocks"] * 7 == counts["tokens"] - 1
    num_bytes = sum(len(sentences(seed).encode()) for seed in range(12))
    assert sum(counts["tokens"] + counts["tokens_left_out"] for counts in splits.values()) == num_bytes + 12


def test_unigram_entropy_by_hand(tmp_path: Path) -> None:
    for name, text in (("train", "aaab"), ("held_out", "abcc")):
        (tmp_path / f"{name}.txt").write_text(text)

    data = prepared(tmp_path / "train.txt", block_length=2, validation=str(tmp_path / "held_out.txt"), test_share=0.0)

    # train targets a a b EOS, validation targets b c c EOS; 257 ids, each counted once more
    nats = -(2 * math.log(2 / 261) + 2 * math.log(1 / 261)) / 4
    assert data.facts["unigram_nats_per_token"] == pytest.approx(nats)
    assert data.facts["unigram_bits_per_byte"] == pytest.approx(nats * 4 / math.log(2) / 3)
    assert data.facts["unseen_share"] == 0.5


def test_too_many_unseen_tokens_are_refused(tmp_path: Path) -> None:
    for name, text in (("train", "aaab"), ("held_out", "abcc")):
        (tmp_path / f"{name}.txt").write_text(text)

    with pytest.raises(ValueError, match=r"data.max_unseen=0.4: 0.5000 of the validation tokens have an id that never"):
        prepared(
            tmp_path / "train.txt",
            block_length=2,
            validation=str(tmp_path / "held_out.txt"),
            test_share=0.0,
            max_unseen=0.4,
        )


@pytest.mark.parametrize(
    ("block_length", "split"), [(700, "validation"), (5000, "train")], ids=["validation", "training"]
)
def test_a_text_shorter_than_a_block_is_refused(corpus: Path, block_length: int, split: str) -> None:
    with pytest.raises(ValueError, match=rf"its {split} text has \d+ tokens, fewer than one block. Allowed: at least"):
        prepared(corpus, block_length=block_length, validation_share=0.05 if split == "validation" else 0.5)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": " "}\n{"text": ""}\n\n')

    with pytest.raises(ValueError, match=r"holds no document with text \(skipped: 1 blank line, 2 empty\)"):
        prepared(corpus)


def test_skipped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl")
    corpus.write_text(corpus.read_text() + json.dumps({"text": sentences(3)}) + '\n{"text": ""}\n\n')

    data = prepared(corpus)

    assert data.facts["skipped"] == {"blank line": 1, "duplicate": 1, "empty": 1}


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "whole"}\n{"text": "ab\\ud83d"}\n')

    with pytest.raises(ValueError, match=r"corpus.jsonl:2: holds half of a surrogate pair at character 2"):
        prepared(corpus)


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    corpus, held_out = write_jsonl(tmp_path / "corpus.jsonl"), tmp_path / "held_out.txt"
    vocabularies = []
    for text in ("zyxzyxzyx " * 50, "qwvqwvqwv " * 50):
        held_out.write_text(text)
        data = prepared(corpus, BPE, validation=str(held_out), test_share=0.0)
        assert data.tokenizer is not None
        vocabularies.append(data.tokenizer.to_json())

    assert vocabularies[0] == vocabularies[1]


def test_a_bpe_that_finds_fewer_tokens_warns_and_records_it(corpus: Path) -> None:
    asked = TokenizerConfig(kind="bpe", vocab_size=4096, path=None)

    with pytest.warns(UserWarning, match=r"tokenizer.vocab_size=4096: the training text has pairs for \d+ tokens only"):
        data = prepared(corpus, asked)

    assert data.vocab_size == data.facts["tokenizer"]["vocab_size"] < 4096
    assert data.facts["tokenizer"]["asked_vocab_size"] == 4096


def vocabulary(folder: Path, characters: str) -> TokenizerConfig:
    """Write a unigram vocabulary of characters whose end of text is a piece like any other."""
    pieces = [("</s>", 0.0), *((character, -1.0) for character in characters)]
    tokenizers.Tokenizer(models.Unigram(pieces, None, False)).save(str(folder / "tokenizer.json"))
    return TokenizerConfig(kind="file", vocab_size=None, path=str(folder / "tokenizer.json"))


def test_a_text_that_becomes_the_end_of_text_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "ab"}\n{"text": "b</s>a"}\n{"text": "ba"}\n')

    with pytest.raises(ValueError, match=r"corpus.jsonl:2: its text holds </s>, which this tokenizer reads as the end"):
        prepared(corpus, vocabulary(tmp_path, "ab</s>"), block_length=1)


def test_a_text_that_the_vocabulary_does_not_know_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "ab"}\n{"text": "abc"}\n{"text": "ba"}\n')

    with pytest.raises(
        ValueError, match=r"tokenizer: cannot encode one of the texts from corpus.jsonl:2 to .* \(Encoun"
    ):
        prepared(corpus, vocabulary(tmp_path, "ab"), block_length=1)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_a_saved_tokenizer_gives_the_data_of_the_run_with_and_without_its_cache(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    config = TokenizerConfig(kind=kind, vocab_size=None if kind == "bytes" else 262, path=None)  # type: ignore[arg-type]
    run = prepared(corpus, config)
    assert run.tokenizer is not None
    run.tokenizer.save(tmp_path / "tokenizer.json")
    saved = saved_tokenizer(config, tmp_path / "tokenizer.json")

    with_cache = prepared(corpus, saved)
    shutil.rmtree(tmp_path / "cache")
    without_cache = prepared(corpus, saved)

    assert with_cache.facts["cache"] == run.facts["cache"]
    assert run.fingerprint == with_cache.fingerprint == without_cache.fingerprint


def test_bytes_of_tokens_are_the_bytes_of_the_text(corpus: Path) -> None:
    for tokenizer in (BYTES, BPE, TokenizerConfig(kind="unigram", vocab_size=270, path=None)):
        assert prepared(corpus, tokenizer).facts["why_no_bits_per_byte"] is None


@pytest.mark.parametrize("pieces", [[normalizers.Lowercase()], [normalizers.NFD()], [normalizers.Prepend(" ")]])
def test_bits_per_byte_are_left_out_where_tokens_spell_another_text(
    corpus: Path, tmp_path: Path, pieces: list[Any]
) -> None:
    # Lower case alone keeps the number of bytes, of another text.
    corpus.write_text("".join(json.dumps({"text": f"Sun {text}"}) + "\n" for text in map(sentences, range(12))))
    run = prepared(corpus, BPE)
    assert run.tokenizer is not None
    run.tokenizer.backend.normalizer = normalizers.Sequence(pieces)
    run.tokenizer.save(tmp_path / "normalising.json")

    config = TokenizerConfig(kind="file", vocab_size=None, path=str(tmp_path / "normalising.json"))
    for _ in ("cache written", "cache read"):
        with pytest.warns(
            UserWarning, match=r"bits per byte are left out: the tokenizer changes \d+ of \d+ held-out texts, as "
        ):
            changed = prepared(corpus, config)

    assert not changed.token_bytes.any()
    assert changed.facts["unigram_bits_per_byte"] is None
    assert changed.compression_bits_per_byte() is None
    assert changed.facts["splits"]["validation"]["bytes"] is None
    assert "whose " in changed.facts["why_no_bits_per_byte"]


def test_composed_accents_leave_a_text_what_it_was(corpus: Path, tmp_path: Path) -> None:
    taken_apart = "cafe\u0301 "  # é as two characters
    corpus.write_text(
        "".join(json.dumps({"text": f"{taken_apart}{text}"}) + "\n" for text in map(sentences, range(12)))
    )
    run = prepared(corpus, BPE)
    assert run.tokenizer is not None
    run.tokenizer.backend.normalizer = normalizers.NFC()
    run.tokenizer.save(tmp_path / "composing.json")

    composed = prepared(corpus, TokenizerConfig(kind="file", vocab_size=None, path=str(tmp_path / "composing.json")))

    assert composed.facts["why_no_bits_per_byte"] is None
    assert "café".encode() in composed.prepared.validation_text()
    assert composed.facts["splits"]["validation"]["bytes"] == len(composed.prepared.validation_text())


def test_the_second_time_the_cache_is_read_and_gives_the_same(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(corpus, BPE)
    monkeypatch.setattr("newllm.data.spelling.text_of", lambda ids, tokenizer: pytest.fail("spelt again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = prepared(corpus, BPE)

    assert first.facts == second.facts
    assert first.train_document_hashes == second.train_document_hashes


def test_a_damaged_cache_is_rebuilt_and_recorded(corpus: Path) -> None:
    first = prepared(corpus)
    stream = Path(first.facts["cache"]["path"]) / "train.bin"
    stream.write_bytes(stream.read_bytes()[:-1])

    with pytest.warns(UserWarning, match=r"train.bin has \d+ of \d+ bytes; it is built again"):
        second = prepared(corpus)

    assert second.fingerprint == first.fingerprint
    assert "train.bin" in second.facts["cache"]["rebuilt_because"]


@pytest.mark.parametrize(
    "changes",
    [{"validation_share": 0.3}, {"test_share": 0.1}, {"validation": "0:2"}],
    ids=lambda change: next(iter(change)),
)
def test_another_split_is_another_cache(corpus: Path, changes: dict[str, object]) -> None:
    assert prepared(corpus).facts["cache"]["path"] != prepared(corpus, **changes).facts["cache"]["path"]


def test_changed_text_is_another_cache(corpus: Path) -> None:
    before = prepared(corpus)
    corpus.write_text(corpus.read_text().replace("moon", "noon"))

    assert prepared(corpus).fingerprint != before.fingerprint


def test_facts_are_plain_values(corpus: Path) -> None:
    facts = prepared(corpus).facts

    assert json.loads(json.dumps(facts)) == facts


def test_ids_are_kept_in_as_few_bytes_as_they_need(corpus: Path, tmp_path: Path) -> None:
    padded = tmp_path / "tokenizer.json"
    data = prepared(corpus)
    assert data.tokenizer is not None
    data.tokenizer.save(padded)

    wide = prepared(corpus, TokenizerConfig(kind="file", vocab_size=70_000, path=str(padded)))

    assert data.prepared.train.stream.dtype == np.uint16
    assert wide.prepared.train.stream.dtype == np.uint32
    assert wide.vocab_size == len(wide.token_bytes) == 70_000
    assert all_labels(wide.prepared.train) == all_labels(data.prepared.train)
