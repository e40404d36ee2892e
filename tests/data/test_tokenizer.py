from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_texts import sentences
from tokenizers import models, pre_tokenizers

from newllm.config.schema import TokenizerConfig
from newllm.data.tokenizer import Tokenizer, byte_of_character, load_tokenizer
from newllm.data.tokenizer_kinds import ready_tokenizer, train_tokenizer

TEXTS = [sentences(seed, 400) for seed in range(5)]


def make(kind: str) -> Tokenizer:
    config = TokenizerConfig(kind=kind, vocab_size=None if kind == "bytes" else 265, path=None)  # type: ignore[arg-type]
    return ready_tokenizer(config) or train_tokenizer(config, TEXTS)


TOKENIZERS = {kind: make(kind) for kind in ("bpe", "bytes", "unigram")}
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=unicode)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=unicode)
def test_token_bytes_are_the_bytes_of_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]

    ids = tokenizer.encode(text)

    assert b"".join(tokenizer.token_texts[token] for token in ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_name_of_eos_in_a_text_is_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]

    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in tokenizer.encode_batch(["a<|endoftext|>b"])[0].tolist()
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_gives_the_ids_of_each_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]

    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]

    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")

    assert loaded.encode(TEXTS[0] + "<|endoftext|>") == tokenizer.encode(TEXTS[0] + "<|endoftext|>")
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.token_texts == tokenizer.token_texts
    assert loaded.to_json() == tokenizer.to_json()


def test_ids_of_bytes_are_the_bytes() -> None:
    assert TOKENIZERS["bytes"].encode("\u00e9t\u00e9 \u6d77\n") == list("\u00e9t\u00e9 \u6d77\n".encode())
    assert (TOKENIZERS["bytes"].eos_id, TOKENIZERS["bytes"].vocab_size) == (256, 257)


def test_byte_characters_are_those_of_the_library() -> None:
    assert set(byte_of_character()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_of_character().values()) == list(range(256))


def test_a_padded_vocabulary_has_ids_without_text() -> None:
    padded = Tokenizer(TOKENIZERS["bytes"].backend, vocab_size=264)

    assert padded.vocab_size == len(padded.token_bytes) == 264
    assert padded.token_bytes[257:].sum() == 0
    assert padded.decode([104, 105, 263]) == "hi"


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size=100: is less than the 257 ids .* Allowed: at least 257"
    ):
        Tokenizer(TOKENIZERS["bytes"].backend, vocab_size=100)


def test_pieces_of_other_vocabularies_count_their_bytes() -> None:
    pieces = [("</s>", 0.0), ("\u2581\u00e9t\u00e9", -1.0), ("<0x41>", -2.0), ("b", -3.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, None, False))
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["   "])

    assert Tokenizer(backend).token_texts == [b"", " \u00e9t\u00e9".encode(), b"A", b"b", b"   "]


def test_a_vocabulary_without_an_end_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))

    with pytest.raises(ValueError, match=r"has no token that ends a text. Allowed: a vocabulary with one of </s>"):
        Tokenizer(backend)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")

    with pytest.raises(ValueError, match=r"tokenizer.path=.*gone.json: cannot be read as a tokenizer \(No such file"):
        load_tokenizer(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"tokenizer.path=.*tokenizer.json: cannot be read as a tokenizer \("):
        load_tokenizer(broken)
