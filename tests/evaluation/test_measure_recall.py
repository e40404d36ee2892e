"""Probes measured by slice, with and without memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_sessions import SEGMENT, model
from torch import Tensor, nn

from newllm.config.compose import compose, examine
from newllm.config.typed import real_config
from newllm.data.module import build_data
from newllm.data.recall import ProbeSamples, Rows
from newllm.evaluation.material import Material
from newllm.evaluation.recall import RecallConfig, _at_length, answering_states, measure
from newllm.evaluation.suite import run_evaluation
from newllm.run import run_training

PLAIN = RecallConfig(kind="recall", knock_out=True, block_lengths=[], num_blocks=4)
NAMES = [{"depth": depth, "segments": segments} for depth in ("low", "high") for segments in ("0", "1")]
NO = -100


class Echo(nn.Module):
    """Answers with the token it reads; keeps nothing."""

    vocab_size = 9
    has_feedback = False

    def initial_state(self, batch_size: int) -> Any:
        return model("pythia").initial_state(batch_size)

    def exact(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(hidden=nn.functional.one_hot(input_ids, self.vocab_size).float())

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def state_bytes(self, length: int) -> int:
        return 10 * length


def material(found: Any, batches: list[dict[str, Tensor]], length: int = 3) -> Any:
    facts = {"slices": NAMES, "chance_accuracy": 0.125}
    data = SimpleNamespace(facts=facts, data_config=SimpleNamespace(block_length=length))
    return SimpleNamespace(model=found, data=data, batches=lambda: iter(batches))


def batch(input_ids: list[list[int]], labels: list[list[int]], slices: list[list[int]]) -> dict[str, Tensor]:
    given = {"input_ids": input_ids, "labels": labels, "slice": slices}
    return {name: torch.tensor(rows) for name, rows in given.items()}


def test_answers_are_counted_by_bucket_of_every_axis() -> None:
    batches = [
        batch([[1, 2, 3], [4, 5, 6]], [[NO, 2, 8], [4, NO, NO]], [[-1, 0, 1], [1, -1, -1]]),
        batch([[7, 8, 1]], [[7, 2, NO]], [[3, 3, -1]]),
    ]

    found = measure(material(Echo(), batches), PLAIN)

    assert found == {
        "accuracy": 0.6,
        "correct": 3,
        "targets": 5,
        "chance_accuracy": 0.125,
        "state_bytes": 30,
        "by_depth": [
            {"depth": "low", "accuracy": 2 / 3, "correct": 2, "targets": 3},
            {"depth": "high", "accuracy": 0.5, "correct": 1, "targets": 2},
        ],
        "by_segments": [
            {"segments": "0", "accuracy": 1.0, "correct": 1, "targets": 1},
            {"segments": "1", "accuracy": 0.5, "correct": 2, "targets": 4},
        ],
    }


def test_answers_that_were_overwritten_are_counted() -> None:
    given = batch([[1, 2, 3], [4, 5, 6]], [[NO, 7, 3], [4, 8, NO]], [[-1, 0, 1], [1, 0, -1]])
    given["outdated"] = torch.tensor([[NO, 2, NO], [NO, 7, NO]])

    found = measure(material(Echo(), [given, given]), PLAIN)

    assert (found["accuracy"], found["outdated_share"]) == (0.5, 0.25)  # the 2 where the 7 replaced it
    assert [line["outdated_share"] for line in found["by_segments"]] == [0.5, 0.0]


@pytest.mark.parametrize("kernel", ["elu", "centred", "ridge", "delta_token"])
def test_an_empty_memory_changes_nothing_before_the_first_write(kernel: str) -> None:
    found = model("pythia infini", memory_kernel=kernel, write=None)
    input_ids = torch.randint(0, 200, (3, 2 * SEGMENT + 1), generator=torch.Generator().manual_seed(0))

    on, off = (answering_states(found, input_ids, use) for use in ("on", "off"))

    assert torch.allclose(on[:, :SEGMENT], off[:, :SEGMENT], atol=1e-6)
    assert not torch.isclose(on[:, SEGMENT:], off[:, SEGMENT:], atol=1e-4).all(-1).any()


def test_another_memory_is_that_of_the_row_before() -> None:
    found = model("infini")
    input_ids = torch.randint(0, 200, (3, SEGMENT), generator=torch.Generator().manual_seed(0))
    same = input_ids.roll(1, dims=0)

    other = answering_states(found, input_ids, "other")
    after = found.exact(input_ids, found.exact(same).state).hidden

    assert torch.allclose(other, after, atol=1e-6)
    assert not torch.allclose(other, answering_states(found, input_ids, "off"), atol=1e-4)


@pytest.mark.parametrize(("stack", "has_memory"), [("infini pythia", True), ("pythia", False)])
def test_memories_are_knocked_out_where_there_are_any(stack: str, has_memory: bool) -> None:
    length = 2 * SEGMENT
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (3, length), generator=generator)
    slices = torch.randint(0, 4, (3, length), generator=generator)
    two, one = (
        {"input_ids": ids[part], "labels": ids[part], "slice": slices[part]} for part in (slice(2), slice(2, 3))
    )

    found = measure(material(model(stack), [two, one], length), PLAIN)
    without = measure(material(model(stack), [two, one], length), RecallConfig(**{**vars(PLAIN), "knock_out": False}))

    assert ("memory_off" in found) == ("other_memory" in found) == has_memory
    assert all(("memory_off" in line) == has_memory for line in found["by_depth"])
    assert not {"memory_off", "other_memory"} & without.keys()
    if has_memory:
        assert found["memory_off"]["targets"] == 3 * length
        assert found["other_memory"]["targets"] == 2 * length  # the last row has no row beside it


def rows_of(samples: Any) -> Rows:
    assert isinstance(samples, ProbeSamples)
    return samples.rows


def trained_and_measured(length: int, num_blocks: int, *overrides: str) -> tuple[Rows, Rows]:
    """The training rows of a probe, and those on which it is measured at another length."""
    config = real_config(compose(list(overrides)))
    data = build_data(config)
    data.prepare()
    run: Any = SimpleNamespace(config=config, data=data)
    measured = _at_length(Material(run, lambda: data, "validation"), length, num_blocks).data
    return rows_of(data.prepared.train), rows_of(measured.prepared.validation)


def beginnings(rows: Rows, length: int) -> set[bytes]:
    return {row.tobytes() for row in rows.inputs[:, :length]}


@pytest.mark.parametrize("times", [0.5, 1, 2])
@pytest.mark.parametrize("data", ["parity", "s3", "mqar", "passkey", "overwrite"])
def test_rows_of_another_length_were_not_trained_on(data: str, times: float) -> None:
    """Drawn with the seed of the training rows they were these rows at the run's own length, and began as them at others."""
    small = {"mqar": ["data.num_pairs=4"], "overwrite": ["data.num_pairs=4", "data.num_rewritten=2"]}.get(data, [])
    length = 64
    given = [f"data={data}", "data.num_samples=1000", f"data.block_length={length}", *small]
    if data == "overwrite":
        given.append("data.filler_length=36")

    trained, measured = trained_and_measured(int(times * length), 40, *given)

    shared = min(length, measured.inputs.shape[1])
    assert measured.inputs.shape == (40, int(times * length))
    assert not beginnings(trained, shared) & beginnings(measured, shared)
    # Nor are they made of the same numbers, cut into rows elsewhere.
    stream = trained.inputs.tobytes()
    assert not any(row.tobytes() in stream for row in measured.inputs[:, :32])


def test_short_rows_that_were_trained_on_by_chance_are_left_out() -> None:
    small = ["data=s3", "data.num_samples=2500", "data.block_length=12"]  # a quarter of all beginnings of five elements

    trained, measured = trained_and_measured(5, 20, *small)

    assert len(measured.inputs) == 20
    assert not beginnings(trained, 5) & beginnings(measured, 5)
    with pytest.raises(
        ValueError, match=r"recall.block_lengths: of 8 rows of 3 tokens 8 are, as far as both go, rows that were"
    ):
        trained_and_measured(3, 4, *small)


def test_data_without_questions_are_refused() -> None:
    assert examine(["evaluation=[recall]"], "train")[1] == [
        "evaluation=[recall]: measures a recall probe, data of kind bible ask for nothing. "
        "Allowed with it: data=mqar, overwrite, parity, passkey, s3. Leave recall out of the list."
    ]


def test_lengths_that_hold_no_row_are_refused() -> None:
    given = ["data=mqar", "evaluation=[recall]", "evaluation.recall.block_lengths=[32,128]"]

    (problem,) = examine(given, "train")[1]

    assert problem.startswith(
        "evaluation.recall.block_lengths: data.num_pairs=16: does not fit into rows of data.block_l"
    )


def test_a_run_is_measured_at_other_lengths_from_its_folder(tmp_path: Path) -> None:
    given = [
        *("experiment=mqar", "size.dim=8", "size.mlp_dim=8", "data.vocab_size=32", "data.num_pairs=2"),
        *("data.block_length=12", "data.num_samples=24", "data.max_unseen=1", "layers.segment_length=4"),
        *("trainer.max_steps=1", "trainer.validate_every_steps=1", "trainer.checkpoint_every_steps=1"),
        *("schedule.warmup_steps=1", "guards=off", "logger=none"),
    ]
    run_training(compose(given), tmp_path / "run", given)

    found = run_evaluation(
        compose(
            [
                *(f"run={tmp_path / 'run'}", "evaluation=[recall]", "evaluation.recall.block_lengths=[9,20]"),
                "evaluation.recall.num_blocks=5",
            ],
            root="evaluate",
        )
    )["recall"]

    assert [line["block_length"] for line in found["by_block_length"]] == [9, 20]
    assert [line["targets"] for line in found["by_block_length"]] == [10, 10]
    assert sum(line["targets"] for line in found["by_gap_tokens"]) == found["targets"]
    assert found["state_bytes"] < found["by_block_length"][1]["state_bytes"] + 1
