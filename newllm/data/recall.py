"""What the recall probes share: rows of random ids, targets only where something is asked, and the slice of each target.

N: rows of all splits together.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch

from newllm.config.fields import Range
from newllm.config.schema import DataConfig, GroupConfig
from newllm.data.prepared import NO_TARGET, Batch, PreparedData

NO_SLICE = -1  # where there is no target
ROWS_AT_ONCE = 1024  # of whose taken ids a table is kept


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(GroupConfig):
    """Generated rows, each a text of its own.

    Attributes:
        has_slices: batches say which slice a target belongs to, and the facts name the slices.
    """

    needs_tokenizer: ClassVar[bool] = False
    has_slices: ClassVar[bool] = True

    num_samples: Annotated[int, Range(minimum=2)]  # rows, training, validation and test together
    generator_seed: Annotated[int, Range(minimum=0)]  # of the rows; the run's own seed does not change them

    def of_length(self, block_length: int) -> Self:
        """Return the probe in rows of another length, tokens; what it asks for stays as it is."""
        return replace(self, block_length=block_length)  # type: ignore[call-arg]  # a key of every DataConfig


Probe = TypeVar("Probe", bound=ProbeConfig)


@dataclass(frozen=True)
class Axis:
    """One way to sort targets.

    Attributes:
        name: what is told apart.
        values: names of its buckets.
        index: bucket of each target, any shape.
    """

    name: str
    values: Sequence[str]
    index: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Drawn rows; all arrays are [N, T].

    Attributes:
        inputs: ids.
        labels: ids, NO_TARGET where nothing is asked.
        slices: number of the target's slice, NO_SLICE where there is no target.
        slice_names: of each slice its bucket on every axis, by the axis' name.
        outdated: ids that were the answer before they were overwritten, NO_TARGET elsewhere; None in probes that overwrite nothing.
    """

    inputs: np.ndarray
    labels: np.ndarray
    slices: np.ndarray
    slice_names: Sequence[dict[str, str]]
    outdated: np.ndarray | None = None

    def part(self, rows: slice | np.ndarray) -> "Rows":
        """Return some of the rows: a slice, their numbers, or a mask [N] that is True for them."""
        outdated = None if self.outdated is None else self.outdated[rows]
        return Rows(self.inputs[rows], self.labels[rows], self.slices[rows], self.slice_names, outdated)


def fresh_draw(probe: Probe, *, block_length: int, num_samples: int) -> Probe:
    """Return the probe in rows of some length, drawn from a stream of their own.

    With the seed of the run the rows would be made of the numbers of its training rows, at its own length they would be these rows:
    a generator gives the same numbers whatever shape is asked of it.

    Args:
        probe: of the run.
        block_length: tokens of a row.
        num_samples: rows.
    """
    stream = np.random.SeedSequence((probe.generator_seed, block_length)).generate_state(1, np.uint64)
    return replace(probe.of_length(block_length), num_samples=num_samples, generator_seed=int(stream[0]))


def not_trained_on(rows: Rows, trained: Rows) -> np.ndarray:
    """Return a mask [N] of the rows that share less than the whole of the shorter row with any trained one, from the start on.

    Of two rows, one of which begins with all of the other, the answers are the same as far as they both go.

    Args:
        rows: of any length.
        trained: rows that were trained on.
    """
    shared = min(rows.inputs.shape[1], trained.inputs.shape[1])
    known = {row.tobytes() for row in trained.inputs[:, :shared]}
    return np.array([row.tobytes() not in known for row in rows.inputs[:, :shared]])


class ProbeSamples:
    """Rows as the loader fetches them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.inputs)

    def __getitems__(self, sample_ids: Sequence[int]) -> Batch:
        """Return the batch of these rows."""
        places = np.asarray(sample_ids, dtype=np.int64)
        input_ids = _tensor(self.rows.inputs[places])
        starts_text = torch.zeros_like(input_ids, dtype=torch.bool)
        starts_text[:, 0] = True
        found = {
            "input_ids": input_ids,
            "labels": _tensor(self.rows.labels[places]),
            "slice": _tensor(self.rows.slices[places]),
            "sample_id": torch.from_numpy(places),
            "starts_text": starts_text,
        }
        if self.rows.outdated is not None:
            found["outdated"] = _tensor(self.rows.outdated[places])
        return found


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


def doubling(name: str, numbers: np.ndarray) -> Axis:
    """Return the axis of the buckets 0, 1, 2-3, 4-7, 8-15 and so on.

    Args:
        name: of the axis.
        numbers: of each target, at least 0.
    """
    buckets = np.frexp(numbers)[1]
    names = [
        str(bucket) if bucket < 2 else f"{2 ** (bucket - 1)}-{2**bucket - 1}" for bucket in range(buckets.max() + 1)
    ]
    return Axis(name, names, buckets)


def slices_of(axes: Sequence[Axis]) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Return the slice of each target, one number for all axes together, and what every number means."""
    number = np.zeros_like(axes[0].index)
    for axis in axes:
        number = number * len(axis.values) + axis.index
    names = [axis.name for axis in axes]
    combinations = itertools.product(*(axis.values for axis in axes))
    return number, [dict(zip(names, values, strict=True)) for values in combinations]


def place_targets(inputs: np.ndarray, positions: np.ndarray, targets: np.ndarray, axes: Sequence[Axis]) -> Rows:
    """Return rows whose targets stand at some positions.

    Args:
        inputs: ids [N, T].
        positions: of the targets of each row [N, number of targets].
        targets: ids, as `positions`.
        axes: of the targets, each index as `positions`.
    """
    labels = np.full(inputs.shape, NO_TARGET, dtype=np.int32)
    slices = np.full(inputs.shape, NO_SLICE, dtype=np.int32)
    numbers, names = slices_of(axes)
    np.put_along_axis(labels, positions, targets, axis=1)
    np.put_along_axis(slices, positions, numbers, axis=1)
    return Rows(inputs.astype(np.int32), labels, slices, names)


def distinct(generator: np.random.Generator, rows: int, ids: range, count: int) -> np.ndarray:
    """Return `count` different ids out of a range for each row [N, count], in random order."""
    return np.stack([generator.choice(len(ids), count, replace=False) for _ in range(rows)]) + ids.start


def other_ids(generator: np.random.Generator, taken: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """Return random ids [N, length], 0 excepted, none of which its row has taken.

    Args:
        generator: of the ids.
        taken: ids [N, any] that are not to be drawn.
        length: ids per row.
        vocab_size: ids are below it.
    """
    drawn = generator.integers(1, vocab_size, size=(len(taken), length), dtype=np.int32)
    for start in range(0, len(taken), ROWS_AT_ONCE):
        part, ids = drawn[start : start + ROWS_AT_ONCE], taken[start : start + ROWS_AT_ONCE]
        is_taken = np.zeros((len(part), vocab_size), dtype=bool)
        np.put_along_axis(is_taken, ids, True, axis=1)
        while (again := np.take_along_axis(is_taken, part, axis=1)).any():
            part[again] = generator.integers(1, vocab_size, size=again.sum(), dtype=np.int32)
    return drawn


def filler_ids(
    filler: Literal["random", "zero"], generator: np.random.Generator, taken: np.ndarray, length: int, vocab_size: int
) -> np.ndarray:
    """Return what stands where nothing is written or asked [N, length]: zeros, or ids that the row has not taken."""
    if filler == "zero":
        return np.zeros((len(taken), length), dtype=np.int32)
    return other_ids(generator, taken, length, vocab_size)


def split_sizes(*, num_samples: int, validation_share: float, test_share: float) -> dict[str, int]:
    """Return how many rows each split offers.

    Raises:
        ValueError: no row would be left for training.
    """
    validation = max(1, round(validation_share * num_samples))
    test = round(test_share * num_samples)
    train = num_samples - validation - test
    if train < 1:
        raise ValueError(
            f"data.validation_share={validation_share}, data.test_share={test_share}: leave no row of "
            f"data.num_samples={num_samples} for training. Allowed: at least one. Lower the shares."
        )
    return {"train": train, "validation": validation, "test": test}


def prepare_rows(
    data: DataConfig, rows: Rows, *, num_samples: int, vocab_size: int, num_answers: int, source: str
) -> PreparedData:
    """Return drawn rows as the data of a run, in the order of the draw: training, validation, test.

    Args:
        data: shares and limits.
        rows: all of them.
        num_samples: how many they are.
        vocab_size: ids are below it.
        num_answers: ids that a target may be, all equally likely: what guessing reaches.
        source: what was drawn, in words.
    Raises:
        ValueError: two rows are alike, or none is left for training.
    """
    hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows.inputs]
    if len(set(hashes)) < num_samples:
        raise ValueError(
            f"data.num_samples={num_samples}: only {len(set(hashes))} rows differ at data.block_length={data.block_length}. "
            "Allowed: rows that all differ. Raise data.block_length or lower data.num_samples."
        )
    sizes = split_sizes(num_samples=num_samples, validation_share=data.validation_share, test_share=data.test_share)
    limits = {"train": data.max_train_blocks, "validation": data.max_validation_blocks, "test": None}
    parts, of_part, start = {}, {}, 0
    for split, size in sizes.items():
        limit = limits[split]
        end = start + (size if limit is None else min(size, limit))
        parts[split], of_part[split] = rows.part(slice(start, end)), frozenset(hashes[start:end])
        start += size
    facts = {
        "kind": data.kind,
        "source": source,
        "targets_are_next_tokens": False,
        "split_rule": "order of the draw",
        "splits": {split: _counts(part) for split, part in parts.items()},
        "skipped": {},
        "slices": list(rows.slice_names),
        "chance_accuracy": 1 / num_answers,
        "unseen_share": _unseen_share(parts["train"], parts["validation"]),
        "unigram_nats_per_token": float(np.log(num_answers)),
        "unigram_bits_per_byte": None,
        "floor_nats_per_token": None,
    }
    return PreparedData(
        tokenizer=None,
        vocab_size=vocab_size,
        token_bytes=np.zeros(vocab_size, dtype=np.int64),
        train=ProbeSamples(parts["train"]),
        validation=ProbeSamples(parts["validation"]),
        test=ProbeSamples(parts["test"]),
        train_document_hashes=of_part["train"],
        validation_document_hashes=of_part["validation"],
        fingerprint=_fingerprint(parts.values()),
        facts=facts,
        targets_are_next_tokens=False,
        validation_text=None,
    )


def _counts(part: Rows) -> dict[str, int]:
    return {
        "documents": len(part.inputs),
        "blocks": len(part.inputs),
        "tokens": part.inputs.size,
        "targets": int((part.labels != NO_TARGET).sum()),
        "bytes": 0,
    }


def _unseen_share(train: Rows, validation: Rows) -> float:
    """Share of the validation rows' ids, answers included, that occur nowhere in training."""
    seen = np.union1d(train.inputs, train.labels)
    asked = np.concatenate([validation.inputs.ravel(), validation.labels[validation.labels != NO_TARGET]])
    return float((~np.isin(asked, seen)).mean())


def _fingerprint(parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        for array in (part.inputs, part.labels, part.slices):
            found.update(f"{array.shape}{array.dtype}".encode())
            found.update(array.tobytes())
    return found.hexdigest()
