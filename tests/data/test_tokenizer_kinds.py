import re

import pytest
from small_texts import WORDS, sentences

from newllm.config.schema import TokenizerConfig
from newllm.data.tokenizer_kinds import describe_training, ready_tokenizer, train_tokenizer

TEXTS = [sentences(seed, 400) for seed in range(3)]


def config(kind: str, vocab_size: int | None) -> TokenizerConfig:
    return TokenizerConfig(kind=kind, vocab_size=vocab_size, path=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_gives_the_asked_vocabulary(kind: str) -> None:
    tokenizer = train_tokenizer(config(kind, 265), TEXTS)

    assert tokenizer.vocab_size == 265
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_training_twice_gives_the_same_tokenizer() -> None:
    one, other = (train_tokenizer(config("bpe", 280), TEXTS) for _ in range(2))

    assert one.to_json() == other.to_json()


def test_unigram_keeps_words_whole_that_occur_with_and_without_a_mark() -> None:
    text = " ".join(word + mark for word in WORDS for mark in ("", ",", ".", ";"))

    tokenizer = train_tokenizer(config("unigram", 275), [text] * 20)

    assert b" river" in [tokenizer.token_texts[token] for token in tokenizer.encode("a river.")]


def test_more_unigram_pieces_than_the_text_supports_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=9000: is more than the \d+ pieces") as error:
        train_tokenizer(config("unigram", 9000), TEXTS)

    supported = int(re.search(r"Allowed: 257 to (\d+)", str(error.value))[1])  # type: ignore[index]
    assert train_tokenizer(config("unigram", supported), TEXTS).vocab_size == supported


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [None, 256])
def test_a_vocabulary_without_room_for_bytes_is_refused(kind: str, vocab_size: int | None) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer.vocab_size={vocab_size}: has no room .* Allowed: at least 257"):
        train_tokenizer(config(kind, vocab_size), TEXTS)


def test_bytes_have_one_size() -> None:
    assert ready_tokenizer(config("bytes", 257)) is not None
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size=300: does not fit tokenizer=bytes. Allowed: 257, or null"
    ):
        ready_tokenizer(config("bytes", 300))


def test_trained_kinds_are_not_ready_and_say_what_decides_them() -> None:
    assert ready_tokenizer(config("bpe", 300)) is None
    assert describe_training(config("bpe", 300)) != describe_training(config("unigram", 300))
    assert describe_training(config("bpe", 300)) != describe_training(config("bpe", 301))
