"""The walk from machine A to machine B is made as the page tells it."""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.config.compose import compose
from newllm.layers.memory_state import MemoryLayerState
from newllm.run import run_training
from newllm.state import parts_of

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_a_memory_travels_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    book = inspect.getsource(textwrap)
    (tmp_path / "text.txt").write_text(book)
    given = [
        *("model=infini", "size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=32"),
        *("layers.num_memory_banks=2", "layers.segment_length=8", "data=jsonl", f"data.path={tmp_path / 'text.txt'}"),
        *("data.max_unseen=1", "data.block_length=16", "data.max_train_blocks=8", "data.max_validation_blocks=2"),
        *("tokenizer=bytes", "trainer.max_steps=2", "trainer.validate_every_steps=1", "schedule.warmup_steps=1"),
        *("callbacks.sample_every_steps=null", "logger=none", "evaluation=[perplexity]"),
    ]
    run_training(compose(given), tmp_path / "run", given)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    known: dict[str, Any] = {"run_folder": tmp_path / "run", "book": book}

    machine_a, machine_b = dict(known), dict(known)
    exec(blocks[0], machine_a)
    exec(blocks[1], machine_b)
    exec(blocks[2], machine_b)

    assert (tmp_path / "book.safetensors").is_file()
    assert machine_b["session"].frozen == (0,)
    moved, kept = (
        parts_of(machine_b[name].state, MemoryLayerState)["layers.0"].memory for name in ("other", "session")
    )
    assert moved.matrix[:, 1].any()
    assert torch.equal(moved.matrix[:, 1], kept.matrix[:, 0])
