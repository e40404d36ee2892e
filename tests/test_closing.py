"""The last words of a run say what its memory is worth."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from newllm.closing import closing_lines
from newllm.config.compose import compose
from newllm.config.typed import real_config

STREAMED = {"val/loss": 2.0, "val/perplexity": 7.39, "val/loss_memory_off": 2.5}
OTHER = {"val/loss_other_memory": 2.25, "val/loss_own_memory": 1.75, "val/other_memory_share": 0.9}
RECALL = {"accuracy": 0.9, "chance_accuracy": 0.01, "state_bytes": 16640}
KNOCKED_OUT = {"memory_off": {"accuracy": 0.1}, "other_memory": {"accuracy": 0.2}}


def told(folder: Path, metrics: dict[str, float], results: dict[str, Any]) -> str:
    (folder / "run.json").write_text(json.dumps({"data": {}, "guards": []}))
    (folder / "config.yaml").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").touch()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 8, **metrics}) + "\n")
    return closing_lines(compose([]), folder, results)


@pytest.mark.parametrize(
    ("metrics", "results", "line"),
    [
        (STREAMED, {}, "memory on: 2.0000 nats, off: 2.5000"),
        (
            STREAMED | OTHER,
            {},
            "memory on: 2.0000 nats, off: 2.5000; another text's: 2.2500, on where there was one (90.0% of the targets): 1.7500",
        ),
        (
            {"val/loss": 2.0, "val/perplexity": 7.39},
            {"memory": {"all": {"loss": 2.0, "loss_memory_off": 2.5}}},
            "memory on: 2.0000 nats over whole texts, off: 2.5000",
        ),
        (
            {"val/loss": 2.0, "val/perplexity": 7.39},
            {"recall": RECALL | KNOCKED_OUT},
            "answers right, memory on: 0.900, off: 0.100, another text's: 0.200 (guessing: 0.010; state 16,640 bytes)",
        ),
    ],
)
def test_memory_on_and_off_stand_side_by_side(
    tmp_path: Path, metrics: dict[str, float], results: dict[str, Any], line: str
) -> None:
    assert line in told(tmp_path, metrics, results).splitlines()


def test_a_model_without_memory_is_told_nothing_of_it(tmp_path: Path) -> None:
    assert "memory on" not in told(
        tmp_path, {"val/loss": 2.0, "val/perplexity": 7.39}, {"recall": RECALL, "memory": {"all": {"loss": 2.0}}}
    )


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        (["model=infini", "trainer=lct"], "perplexity,positions,lag,generation"),
        (["model=pythia", "trainer=standard"], "perplexity,positions,generation"),
        (["model=infini", "trainer=streaming"], "perplexity,positions,generation"),
        (["model=infini", "trainer=streaming", "model.feedback=additive"], "perplexity,positions,generation"),
        (["data=mqar", "model=infini", "trainer=standard"], "perplexity,positions"),
        (["model=context", "trainer=cvfp_phase1"], "contexts"),
    ],
)
def test_only_evaluations_that_the_run_allows_are_suggested(tmp_path: Path, given: list[str], suggested: str) -> None:
    told(tmp_path, {"val/loss": 2.0, "val/perplexity": 7.39}, {})

    line = closing_lines(real_config(compose(given)), tmp_path, {}).splitlines()[-1]

    assert line == f"next:    python evaluate.py run={tmp_path} 'evaluation=[{suggested}]'"


def test_lag_is_told_with_the_step_at_which_it_was_measured(tmp_path: Path) -> None:
    lag = {"lag/relative_error": 0.25, "lag/sweeps_to_tolerance": 7.0}
    lines = [{"step": 50, "tokens": 8, **lag}, {"step": 60, "tokens": 9, "val/loss": 2.0, "val/perplexity": 7.39}]
    told(tmp_path, {}, {})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    found = closing_lines(compose([]), tmp_path, {})

    line = "lag of the cached states at step 50: 0.250 of their size; 7 sweeps make them exact to 1e-4"
    assert line in found.splitlines()


def test_newton_steps_that_settle_are_told_beside_the_sweeps(tmp_path: Path) -> None:
    lag = {"lag/relative_error": 0.25, "lag/sweeps_to_tolerance": 7.0, "lag/newton_to_tolerance": 2.0}
    told(tmp_path, {"val/loss": 2.0, "val/perplexity": 7.39, **lag}, {})

    assert "7 sweeps or 2 Newton steps make them exact to 1e-4" in closing_lines(compose([]), tmp_path, {})


def test_the_next_command_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "a \u00f6, (x)'s"
    folder.mkdir()
    told(folder, {"val/loss": 2.0, "val/perplexity": 7.39}, {})

    *_, see, following = closing_lines(real_config(compose([])), folder, {}).splitlines()

    assert shlex.split(see)[-1] == str(tmp_path)
    assert compose(shlex.split(following)[3:], root="evaluate").run == str(folder)
