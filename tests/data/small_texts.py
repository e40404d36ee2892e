"""Small corpora and configurations that the tests of the data share."""

import json
import random
from pathlib import Path
from typing import Any

from newllm.config.schema import TokenizerConfig
from newllm.data.delay_copy import DelayCopyConfig
from newllm.data.jsonl import JsonlConfig
from newllm.data.module import TextDataModule

WORDS = [
    "sun",
    "moon",
    "river",
    "stone",
    "bird",
    "song",
    "night",
    "fire",
    "winter",
    "seed",
    "\u6d77",
    "\u5c71",
    "\u00e9t\u00e9",
]
BYTES = TokenizerConfig(kind="bytes", vocab_size=None, path=None)
BPE = TokenizerConfig(kind="bpe", vocab_size=300, path=None)


def sentences(seed: int, num_words: int = 60) -> str:
    """Return a text of known words in an order that the seed decides."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(num_words)) + "."


def write_jsonl(path: Path, num_documents: int = 12, *, text_field: str = "text") -> Path:
    """Write a corpus of different texts, one JSON object per line."""
    lines = [json.dumps({text_field: sentences(seed)}, ensure_ascii=False) for seed in range(num_documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shared_keys(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the keys that every source has, with the cache inside the folder."""
    keys: dict[str, Any] = {
        "block_length": 7,
        "batch_size": 3,
        "eval_batch_size": 5,
        "num_workers": 0,
        "shuffle": True,
        "validation_share": 0.2,
        "test_share": 0.2,
        "max_train_blocks": None,
        "max_validation_blocks": None,
        "max_unseen": 1.0,
        "cache_dir": str(folder / "cache"),
    }
    return keys | changes


def streaming_keys(**changes: Any) -> dict[str, Any]:
    """Return the keys of every corpus that can be streamed."""
    return {"streaming": False, "shuffle_buffer": 400, "sample_characters": 3000} | changes


def jsonl_config(corpus: Path, **changes: Any) -> JsonlConfig:
    """Return a configuration of local files, its cache beside them."""
    folder = corpus if corpus.is_dir() else corpus.parent
    own = {"kind": "jsonl", "path": str(corpus), "text_field": "text", "validation": None, **streaming_keys()}
    return JsonlConfig(**shared_keys(folder, **(own | changes)))


def delay_config(folder: Path, **changes: Any) -> DelayCopyConfig:
    """Return a configuration of the delay probe."""
    own = {"kind": "delay_copy", "delay": 2, "vocab_size": 5, "num_samples": 20, "generator_seed": 3}
    return DelayCopyConfig(**shared_keys(folder, **(own | changes)))


def prepared(path: Path, tokenizer: TokenizerConfig = BYTES, *, seed: int = 0, **changes: Any) -> TextDataModule:
    """Return the data module of local files, prepared."""
    module = TextDataModule(jsonl_config(path, **changes), tokenizer, seed=seed)
    module.prepare()
    return module
