"""The tokenizers a configuration can name: made ready, fetched, or trained on the training text."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from newllm.config.schema import TokenizerConfig
from newllm.data.tokenizer import END_OF_TEXT, Tokenizer, byte_of_character, load_tokenizer
from newllm.hub import fetch_file

HUB_REPOSITORIES = {"pythia": "EleutherAI/pythia-70m", "gpt2": "openai-community/gpt2"}
TRAINED = ("bpe", "unigram")
NUM_BYTES = 256
SCORE_DIGITS = 9  # decimals of a unigram score, in nats
NEVER = -1e6  # score of a piece that is worse than any spelling
MAX_PIECE_BYTES = 48  # 16 characters of three bytes: a Japanese piece may be as long as SentencePiece allows


def ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Return the tokenizer if it can be had without any text; None if it must be trained.

    Raises:
        ValueError: its file is missing, or the hub cannot be reached.
    """
    match config.kind:
        case "bytes":
            return _checked_size(Tokenizer(_byte_backend()), config)
        case "file":
            assert config.path is not None, "the configuration refuses tokenizer=file without tokenizer.path"
            return load_tokenizer(config.path, vocab_size=config.vocab_size)
        case "pythia" | "gpt2":
            path = fetch_file(HUB_REPOSITORIES[config.kind], "tokenizer.json", key=f"tokenizer={config.kind}")
            return load_tokenizer(path, vocab_size=config.vocab_size)
    return None


def saved_tokenizer(config: TokenizerConfig, path: Path) -> TokenizerConfig:
    """Return the configuration that reads the tokenizer a run of `config` has saved, with the same vocabulary size."""
    is_trained = config.kind in TRAINED  # then the file holds exactly the run's vocabulary
    return replace(config, kind="file", path=str(path), vocab_size=None if is_trained else config.vocab_size)


def describe_training(config: TokenizerConfig) -> dict[str, Any]:
    """Return what decides the outcome of training besides the text."""
    return {"kind": config.kind, "vocab_size": config.vocab_size, "tokenizers": tokenizers.__version__}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Return a byte-level tokenizer trained on texts, which must be training texts only.

    Any text can be encoded: single bytes are tokens. BPE may end with fewer tokens than asked for if the text has
    too few pairs; the caller sees it in vocab_size.

    Raises:
        ValueError: vocab_size has no room for the bytes and EOS, or the text gives too few pieces for unigram.
    """
    if config.vocab_size is None or config.vocab_size <= NUM_BYTES:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size}: has no room for the {NUM_BYTES} bytes and the end of text. "
            f"Allowed: at least {NUM_BYTES + 1}. Set tokenizer.vocab_size or choose tokenizer=bytes."
        )
    return (_train_bpe if config.kind == "bpe" else _train_unigram)(config.vocab_size, texts)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    backend = _byte_level(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.train_from_iterator(texts, trainers.BpeTrainer(**_settings(vocab_size)))
    return Tokenizer(backend)


def _train_unigram(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    backend = _byte_level(models.Unigram(), _spaced_words())
    trainer = trainers.UnigramTrainer(**_settings(vocab_size), max_piece_length=MAX_PIECE_BYTES)
    backend.train_from_iterator(texts, trainer)
    backend.model = _settled(backend)
    tokenizer = Tokenizer(backend)
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size}: is more than the {tokenizer.vocab_size} pieces that the training text "
            f"supports. Allowed: {NUM_BYTES + 1} to {tokenizer.vocab_size}. Set tokenizer.vocab_size or give more text."
        )
    return tokenizer


def _settings(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "special_tokens": [END_OF_TEXT],
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "show_progress": False,
    }


def _byte_level(model: Any, pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """Return a backend that works on bytes: nothing is normalised, so decoding gives the text back exactly."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _spaced_words() -> Any:
    """Return the division of text that unigram training needs: at spaces only, punctuation stays with its word.

    The trainer takes its first pieces from what recurs among different words: divided as GPT-2 does, " and" is one
    word, recurs in no other, and is lost. On the Bible that costs a third more tokens.
    """
    words = pre_tokenizers.Split(Regex(r" ?\S+"), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _settled(backend: tokenizers.Tokenizer) -> Any:
    """Return the unigram model with scores that survive saving, and with an end of text that no text can become.

    The library reads numbers of many digits back with an error in the last, and gives EOS the best score of all.
    """
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    scores = [(piece, NEVER if piece == END_OF_TEXT else round(score, SCORE_DIGITS)) for piece, score in pieces]
    return models.Unigram(scores, unk_id=None, byte_fallback=False)


def _byte_backend() -> tokenizers.Tokenizer:
    """Return a backend whose id of a byte is the byte; EOS follows."""
    undivided = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = _byte_level(models.BPE(vocab=byte_of_character(), merges=[]), undivided)
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _checked_size(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    if config.vocab_size in (None, tokenizer.vocab_size):
        return tokenizer
    raise ValueError(
        f"tokenizer.vocab_size={config.vocab_size}: does not fit tokenizer={config.kind}. "
        f"Allowed: {tokenizer.vocab_size}, or null. Leave tokenizer.vocab_size out."
    )
