"""Japanese text, packed, through unigram pieces: openings of books out of copyright (japanese.jsonl)."""

import gzip
import json
from pathlib import Path

import pytest
from small_texts import jsonl_config

from newllm.config.compose import compose
from newllm.config.schema import TokenizerConfig
from newllm.data.module import TextDataModule
from newllm.load import load_run
from newllm.run import run_training

BOOKS = Path(__file__).parent / "japanese.jsonl"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "japanese.jsonl.gz"
    path.write_bytes(gzip.compress(BOOKS.read_bytes()))
    return path


def prepared(path: Path, vocab_size: int) -> TextDataModule:
    tokenizer = TokenizerConfig(kind="unigram", vocab_size=vocab_size, path=None)
    module = TextDataModule(jsonl_config(path), tokenizer, seed=0)
    module.prepare()
    return module


def test_packed_japanese_comes_back_from_its_pieces(packed: Path) -> None:
    module = prepared(packed, 330)
    tokenizer = module.tokenizer
    assert tokenizer is not None

    texts = [json.loads(line)["text"] for line in BOOKS.read_text(encoding="utf-8").splitlines()]

    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert module.facts["why_no_bits_per_byte"] is None
    # A character is three bytes: fewer tokens than bytes come from pieces of whole characters, with no space anywhere.
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert num_tokens < 0.8 * num_bytes
    assert "\u3042\u308b".encode() in tokenizer.token_texts or "\u3067\u3042\u308b".encode() in tokenizer.token_texts


def test_the_published_vocabulary_is_more_than_so_little_text_supports(packed: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer\.vocab_size=16000: is more than the \d+ pieces that the training text"
    ):
        prepared(packed, 16000)


def test_a_file_cut_in_the_middle_is_named_with_the_byte(packed: Path) -> None:
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ValueError, match=r"japanese\.jsonl\.gz: is damaged after byte \d+ of its text"):
        prepared(packed, 330)


@pytest.mark.slow
def test_a_recursive_model_is_trained_on_it_from_the_command_line(packed: Path, tmp_path: Path) -> None:
    given = [
        *("model=trm", "trainer=trm", "size.dim=16", "size.num_heads=2", "size.mlp_dim=32", "tokenizer=unigram"),
        *("tokenizer.vocab_size=330", "data=jsonl", f"data.path={tmp_path}/*.jsonl.gz", "data.block_length=16"),
        *("debug=fast", f"data.cache_dir={tmp_path / 'cache'}", "data.validation_share=0.2", "logger=none"),
    ]

    run_training(compose(given), tmp_path / "run", given)

    run = load_run(tmp_path / "run")
    assert run.facts["status"] == "finished"
    assert run.tokenizer.decode(run.tokenizer.encode("\u732b")) == "\u732b"
