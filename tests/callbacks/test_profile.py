import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import TinyModule, fit

from newllm.callbacks.profile import FIRST_STEPS, ROWS, STEPS, ProfileSteps


def run(callbacks: list[Callback], **options: Any) -> TinyModule:
    module = TinyModule()
    fit(module, callbacks, enable_checkpointing=False, **options)
    return module


def steps_in(trace: Path) -> int:
    """Optimizer steps that a trace shows."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trace_shows_three_steps_and_the_table_ten_operations(tmp_path: Path, accumulate: int) -> None:
    run([ProfileSteps(tmp_path)], max_steps=FIRST_STEPS + STEPS + 2, accumulate=accumulate)

    assert steps_in(tmp_path / "profile" / "trace.json.gz") == STEPS
    rows = [line for line in (tmp_path / "profile" / "operations.txt").read_text().splitlines() if "%" in line]
    assert len(rows) == ROWS + 1  # the head names shares in %


def test_run_that_ends_early_leaves_the_steps_there_are(tmp_path: Path) -> None:
    run([ProfileSteps(tmp_path)], max_steps=FIRST_STEPS + 1)

    assert steps_in(tmp_path / "profile" / "trace.json.gz") == 1


def test_run_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run([ProfileSteps(tmp_path)], max_steps=FIRST_STEPS)

    assert "the session made 3 steps, the first that is looked at is 4" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_profile_leaves_the_weights_as_they_would_be(tmp_path: Path) -> None:
    plain = run([], max_steps=FIRST_STEPS + STEPS)
    looked_at = run([ProfileSteps(tmp_path)], max_steps=FIRST_STEPS + STEPS)

    assert torch.equal(plain.net[1].weight, looked_at.net[1].weight)
