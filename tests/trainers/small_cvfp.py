"""A small text, and the procedures of CVFP on a small model over it."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from newllm.config.compose import compose
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.data.module import build_data
from newllm.layers.context_block import initialise
from newllm.models.create import build_model
from newllm.trainers.build import build_training_module

WORDS = ["in", "the", "beginning", "was", "a", "word", "and", "many", "were", "with", "it", "some", "long", "short"]


@cache
def text_keys() -> tuple[str, ...]:
    """Return overrides that choose a small text of several documents."""
    folder = Path(tempfile.mkdtemp())
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(60):
        order = torch.randint(len(WORDS), (6,), generator=generator)
        lines.append(json.dumps({"text": " ".join(WORDS[index] for index in order)}))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return (
        *(
            "data=jsonl",
            f"data.path={folder / 'text.jsonl'}",
            f"data.cache_dir={folder / 'cache'}",
            "data.max_unseen=1",
        ),
        *("tokenizer=bytes", "data.block_length=10", "data.max_train_blocks=12", "data.max_validation_blocks=3"),
    )


def small_keys(trainer: str, *overrides: str) -> list[str]:
    """Return overrides of a small run."""
    return [
        *("model=context", "size.dim=6", "model.context_dim=4", "embedding=random", "embedding.freeze=true"),
        *(f"trainer={trainer}", "trainer.slice_tokens=50", *text_keys(), *overrides),
    ]


def small_config(trainer: str, *overrides: str) -> TrainConfig:
    """Return the configuration of a small run."""
    return real_config(compose(small_keys(trainer, *overrides)))


def small_procedure(trainer: str, *overrides: str, weight_std: float = 0.5, folder: Path = Path()) -> Any:
    """Return the procedure over a model whose contexts remember some tokens."""
    config = small_config(trainer, *overrides)
    data = build_data(config)
    data.prepare()
    torch.manual_seed(1)
    model = build_model(config, data.vocab_size)
    initialise(model, weight_std=weight_std, bias_std=0.1)
    return build_training_module(
        model, config, data.token_bytes, num_samples=data.num_train_samples, folder=folder, data=data
    )


def one_text(procedure: Any, split: str = "train") -> torch.Tensor:
    """Return the tokens of a stream [1, N]."""
    positions = procedure.positions[split] if isinstance(procedure.positions, dict) else procedure.positions
    return positions.__getitems__(range(len(positions)))["input_ids"]
