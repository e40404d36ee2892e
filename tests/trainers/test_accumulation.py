"""Batches whose gradients are added up make the step that one large batch makes, at the end of an epoch too."""

import inspect
import json
import textwrap
from pathlib import Path

import pytest

from newllm.config.compose import compose
from newllm.run import run_training
from newllm.run_record import read_metrics

TINY = [
    *("model=pythia", "trainer=standard", "size.dim=16", "size.num_heads=2", "size.mlp_dim=32"),
    *("data=jsonl", "data.block_length=16", "data.eval_batch_size=4", "data.max_validation_blocks=4"),
    *("data.max_unseen=1", "tokenizer=bytes", "schedule.warmup_steps=0", "optimizer.lr=1e-2"),
    *("trainer.log_every_steps=1", "trainer.max_steps=12", "trainer.validate_every_steps=4", "evaluation=[]"),
    *("callbacks=quiet", "logger=none", "data.max_train_blocks=20"),
]


def lines(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Return the metrics of a run, a line per step."""
    text = folder / "text.jsonl"
    if not text.exists():
        sources = [inspect.getsource(module) for module in (inspect, json, textwrap)]
        pieces = [source[start : start + 700] for source in sources for start in range(0, 7000, 700)]
        text.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    given = [*TINY, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *overrides]
    run_training(compose(given), folder / "_".join(overrides).replace(".", "_"), given)
    return read_metrics(folder / "_".join(overrides).replace(".", "_"))


@pytest.mark.parametrize(("rows", "batches"), [(4, 2), (2, 4)])
def test_accumulated_batches_make_the_steps_of_one_batch(tmp_path: Path, rows: int, batches: int) -> None:
    """20 blocks: steps of 8, 8 and 4. The last has half the batches, and is a mean over its own targets all the same."""
    whole = lines(tmp_path, "data.batch_size=8", "trainer.accumulate_batches=1")
    parts = lines(tmp_path, f"data.batch_size={rows}", f"trainer.accumulate_batches={batches}")

    assert [line["step"] for line in parts] == list(range(1, 13))
    for name in ("train/loss", "optim/grad_norm", "val/loss"):
        expected, found = ([line[name] for line in run if name in line] for run in (whole, parts))
        assert found == pytest.approx(expected, rel=2e-4), name


def test_validations_come_after_the_same_steps(tmp_path: Path) -> None:
    """20 blocks in batches of 4 are two steps and a half: batches do not count steps."""
    parts = lines(tmp_path, "data.batch_size=4", "trainer.accumulate_batches=2")

    assert [line["step"] for line in parts if "val/loss" in line] == [4, 8, 12]
