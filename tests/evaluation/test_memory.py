"""What memory is worth by segment of a text: sums by hand, and a run measured from its folder."""

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from newllm.config.compose import compose
from newllm.evaluation.memory import _compare, _difference, _doubling_edges, _sums
from newllm.evaluation.suite import run_evaluation
from newllm.run import run_training

TINY = [
    *("size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=32"),
    *("data=jsonl", "data.block_length=16", "data.batch_size=2", "data.eval_batch_size=2"),
    *("data.validation_share=0.4", "data.max_unseen=1", "tokenizer=bytes"),
    *("trainer.max_steps=2", "trainer.validate_every_steps=2", "trainer.checkpoint_every_steps=2"),
    *("trainer.log_every_steps=1", "callbacks.lag_every_steps=null", "callbacks.sample_every_steps=null"),
    *("guards=off", "logger=none", "schedule.warmup_steps=1", "evaluation=[perplexity]"),
]


def train(folder: Path, *overrides: str) -> Path:
    text = folder / "text.jsonl"
    sources = [inspect.getsource(module)[:700] for module in (argparse, inspect, textwrap, json, Path)]
    text.write_text("\n".join(json.dumps({"text": source}) for source in sources))
    given = [*TINY, f"data.path={text}", f"data.cache_dir={folder / 'cache'}", *overrides]
    run_training(compose(given), folder / "run", given)
    return folder / "run"


def evaluate(folder: Path, *overrides: str, which: str = "memory") -> dict:
    return run_evaluation(compose([f"run={folder}", f"evaluation=[{which}]", *overrides], root="evaluate"))[which]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two streaming steps."""
    return train(tmp_path_factory.mktemp("streamed"), "model=infini", "layers.segment_length=8", "trainer=streaming")


def test_segments_are_grouped_by_doubling():
    assert _doubling_edges(11) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]
    assert _doubling_edges(1) == [(0, 1)]


def test_losses_are_weighted_by_targets_and_short_texts_left_out():
    by_text = {
        0: {"exact": np.array([1.0, 2.0, 3.0]), "memory_off": np.array([1.0, 4.0, 6.0])},
        7: {"exact": np.array([5.0]), "memory_off": np.array([5.0])},
    }

    late = _compare(_sums(by_text, 1, 9), 10)
    first = _compare(_sums(by_text, 0, 1), 10)

    assert (late["loss"], late["loss_memory_off"], late["memory_off_minus_on"]) == (2.5, 5.0, 2.5)
    assert (late["texts"], late["targets"], late["memory_off_minus_on_low"]) == (1, 2, None)
    assert (first["loss"], first["memory_off_minus_on"], first["texts"]) == (3.0, 0.0, 2)


def test_another_texts_memory_is_compared_on_its_own_targets():
    nothing = float("nan")
    by_text = {
        0: {
            "exact": np.array([1.0, 2.0, 3.0]),
            "memory_off": np.array([9.0, 9.0, 9.0]),
            "other_memory": np.array([nothing, 4.0, 4.0]),
        },
        7: {"exact": np.array([5.0]), "memory_off": np.array([9.0]), "other_memory": np.array([nothing])},
    }

    whole, first = _compare(_sums(by_text, 0, 9), 10), _compare(_sums(by_text, 0, 1), 10)

    assert (whole["loss"], whole["targets"], whole["texts"]) == (11 / 4, 4, 2)
    assert (whole["loss_other_memory"], whole["loss_own_memory"], whole["other_memory_minus_own"]) == (4.0, 2.5, 1.5)
    assert (whole["targets_other_memory"], whole["texts_other_memory"]) == (2, 1)
    assert not [name for name in first if "other" in name or "own" in name]


def test_interval_resamples_texts_and_never_tokens():
    same = _difference(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]), "worth", 100)
    apart = _difference(np.array([0.0, 10.0]), np.array([10.0, 10.0]), "worth", 1000)

    assert same == {"worth": 0.5, "worth_low": 0.5, "worth_high": 0.5}
    assert (apart["worth"], apart["worth_low"], apart["worth_high"]) == (0.5, 0.0, 1.0)


def test_tokens_seen_are_those_of_the_texts_without_what_fills_their_last_blocks(tmp_path: Path):
    train(tmp_path, "model=pythia", "trainer=streaming", "trainer.max_steps=44", "trainer.validate_every_steps=44")

    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    of_one_epoch = facts["data"]["splits"]["train"]["targets"]
    assert facts["data"]["splits"]["train"]["blocks"] == 2 * 44  # both lanes are read to their ends
    assert facts["tokens"] == of_one_epoch < 2 * 44 * 16


def test_measured_numbers_are_those_the_run_logged(streamed: Path):
    logged = json.loads((streamed / "run.json").read_text())["metrics"]
    reproduced = json.loads((streamed / "evaluation.json").read_text())["reproduced"]

    found = evaluate(streamed)

    assert all(entry["equal"] for entry in reproduced.values()), reproduced
    for name in ("loss", "loss_memory_off", "loss_other_memory", "loss_own_memory"):
        assert found["all"][name] == pytest.approx(logged[f"val/{name}"], rel=1e-9)
    share = found["all"]["targets_other_memory"] / found["all"]["targets"]
    assert share == pytest.approx(logged["val/other_memory_share"], rel=1e-12)
    assert found["all"]["targets_other_memory"] == sum(
        line.get("targets_other_memory", 0) for line in found["by_segment"]
    )
    assert found["all"]["targets"] == sum(line["targets"] for line in found["by_segment"])
    assert found["all"]["texts"] == 2


def test_before_anything_is_written_memory_makes_no_difference(streamed: Path):
    first, second = evaluate(streamed)["by_segment"][:2]

    assert first["segments"] == "0"
    # Each lane is one text: in their first blocks, of two segments, nobody has written anything.
    assert not [name for line in (first, second) for name in line if "other_memory" in name]
    assert first["memory_off_minus_on"] == pytest.approx(0, abs=1e-6)
    assert second["memory_off_minus_on"] != 0


def test_positions_of_texts_in_lanes_are_scored_with_the_state_that_is_carried(streamed: Path):
    whole, by_segment = evaluate(streamed, which="perplexity"), evaluate(streamed)["by_segment"]

    found = evaluate(streamed, which="positions")

    for lines in found.values():
        assert sum(line["targets"] for line in lines) == whole["targets"]
        mean = sum(line["loss"] * line["targets"] for line in lines) / whole["targets"]
        assert mean == pytest.approx(whole["loss"], rel=1e-12)
    # Two segments are a block here; the buckets are those that the memory is measured in.
    assert [line["positions"] for line in found["by_segment"][:4]] == ["0-7", "8-15", "16-31", "32-63"]
    for line, same in zip(found["by_segment"], by_segment, strict=True):
        assert (line["targets"], line["loss"]) == (same["targets"], pytest.approx(same["loss"], rel=1e-12))


def test_lag_from_an_empty_state_is_refused_where_the_state_is_carried(
    streamed: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as refused:
        evaluate(streamed, which="lag")

    assert refused.value.code == 2
    assert (
        "evaluation.lag: sweeps each block from an empty state, trainer=streaming carries it" in capsys.readouterr().err
    )


def test_bytes_are_those_that_cross_from_block_to_block(streamed: Path):
    found, longer = evaluate(streamed), evaluate(streamed, "evaluation.memory.context_tokens=4")

    assert found["memory_bytes"] == 4 * (16 * 16 + 16)
    assert found["state_bytes"] == found["memory_bytes"]
    assert longer["state_bytes"] == found["state_bytes"] + 4 * 2 * 4 * 16
    assert (found["segment_length"], found["context_tokens"], longer["context_tokens"]) == (8, 0, 4)


def test_runs_that_never_carried_a_memory_are_measured_too(tmp_path: Path):
    standard = train(tmp_path, "model=pythia", "layers.window=8", "evaluation=[]")

    found = evaluate(standard)

    assert "loss_memory_off" not in found["all"]
    assert found["memory_bytes"] == 0
    assert found["segment_length"] == 8


def test_samples_without_text_are_refused():
    with pytest.raises(ValueError, match=r"evaluation=\[memory\]: reads texts from beginning to end, data=delay_copy"):
        compose(["data=delay_copy", "model=infini", "evaluation=[memory]"])
