"""What Lightning, the callbacks and the loader cost: steps of a run of train.py against a bare loop of the same model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.steps import bare_step, parallel_loss
from bench.training import repeated
from newllm.config.compose import compose
from newllm.config.typed import real_config
from newllm.data.module import build_data
from newllm.models.create import build_model

# (size, optimizer steps of a call)
SIZES = {"nano": 40, "small": 10}
# Everything of a default run is on; what comes every 200 steps, validation, samples and checkpoints, is not due in between.
OVERRIDES = ["data=bible", "schedule.warmup_steps=1", "evaluation=[]", "trainer.max_steps=100000"]
NOT_DUE = [f"trainer.{key}_every_steps=100000" for key in ("validate", "checkpoint")]
ROOT = Path(__file__).parent.parent


@contextmanager
def run_of_train(size: str, steps: int) -> Iterator[Callable[[], None]]:
    """A run of train.py in a process of its own; a call lets it make so many steps and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.stepping_run", str(steps), f"size={size}", f"output_dir={folder}"]
        process = subprocess.Popen(
            [*command, *OVERRIDES, *NOT_DUE],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(Path(folder) / "stderr.txt", "w"),  # noqa: SIM115
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def call() -> None:
            print("go", file=process.stdin, flush=True)
            for line in process.stdout:  # type: ignore[union-attr]
                if line.startswith("steps made"):
                    return
            raise RuntimeError(f"the run ended:\n{(Path(folder) / 'stderr.txt').read_text()[-2000:]}")

        try:
            yield call
        finally:
            process.kill()
            process.wait()


def bare_loop(size: str, steps: int) -> Callable[[], None]:
    """Return a call that makes as many steps on batches of the same data."""
    config = real_config(compose([f"size={size}", *OVERRIDES]))
    data = build_data(config)
    data.prepare()
    model = build_model(config, data.vocab_size).to(DEVICE).train()
    batch = next(iter(data.train_dataloader()))
    return repeated(
        bare_step(model, parallel_loss(model, batch["input_ids"].to(DEVICE), batch["labels"].to(DEVICE))), steps
    )


def run(quick: bool) -> Found:
    """Measure both sizes."""
    lines, figures = [], {}
    for size, steps in {"nano": 2}.items() if quick else SIZES.items():
        with run_of_train(size, steps) as train:
            rows = take_turns({"bare loop": bare_loop(size, steps), "train.py": train}, rounds=2 if quick else 9)
        if not quick:
            require_quiet(rows, f"framework, {size}")
        bare, own = rows
        ratio = paired_ratio(bare, own)
        cells = [f"{1000 * row.median / steps:.1f} ms" for row in rows]
        lines.append([size, *cells, f"{ratio:.3f}", f"{own.warmup_seconds:.0f} s"])
        print(*lines[-1], sep=" | ", flush=True)
        figures[size] = {row.name: row.figures() | {"steps_per_call": steps} for row in rows} | {"ratio": ratio}
    head = ["size", "bare loop, a step", "train.py, a step", "bare / train.py", "warm-up of train.py"]
    told = (
        "Default run with all callbacks and guards on; validation, samples and checkpoints are not due in the steps "
        "measured. The bare loop goes over one batch again and again, the run draws its own."
    )
    return Found(f"{table(head, lines)}\n\n{told}", figures)
