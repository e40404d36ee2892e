"""What holds for every row of every recall probe."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_probes import asked, last_value, mqar_config, overwrite_config, passkey_config, tracking_config
from small_texts import BYTES

from newllm.config.compose import examine
from newllm.data.mqar import draw_gaps
from newllm.data.prepared import NO_TARGET, PreparedData, count_tokens_read
from newllm.data.recall import NO_SLICE, Axis, Rows, distinct, doubling, other_ids, slices_of
from newllm.data.state_tracking import product_table

PROBES = [mqar_config, passkey_config, overwrite_config, tracking_config]
probes = pytest.mark.parametrize("make", PROBES, ids=lambda make: make.__name__.removesuffix("_config"))


def draw(config: Any) -> Rows:
    return importlib.import_module(f"newllm.data.{config.kind}").draw_rows(config)


def prepare(config: Any) -> PreparedData:
    return importlib.import_module(f"newllm.data.{config.kind}").prepare(config, BYTES)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    pairs=st.integers(1, 6),
    spare=st.integers(0, 9),
    filler=st.sampled_from(["random", "zero"]),
)
def test_mqar_asks_every_key_once_for_the_value_written_after_it(
    seed: int, pairs: int, spare: int, filler: str
) -> None:
    config = mqar_config(
        generator_seed=seed, num_pairs=pairs, block_length=4 * pairs + spare, vocab_size=2 * pairs + 2, filler=filler
    )
    assert config.check(None) == []  # type: ignore[arg-type]

    rows = draw(config)

    for row, position, target, slice_names in asked(rows):
        value, place = last_value(row, position)
        low, _, high = slice_names["gap_tokens"].partition("-")
        assert target == value
        assert place < 2 * pairs <= position
        assert int(low) <= position - place <= int(high or low)
    for row, labels in zip(rows.inputs.tolist(), rows.labels.tolist(), strict=True):
        keys = [row[place] for place, label in enumerate(labels) if label != NO_TARGET]
        assert sorted(keys) == sorted(row[: 2 * pairs : 2])
        assert len(set(keys)) == pairs
        assert all(1 <= key <= pairs for key in keys)
        assert all(value > pairs for value in row[1 : 2 * pairs : 2])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), pairs=st.integers(1, 5), rewritten=st.integers(1, 5), filler=st.integers(0, 7))
def test_overwrite_asks_for_the_value_written_last(seed: int, pairs: int, rewritten: int, filler: int) -> None:
    rewritten = min(pairs, rewritten)
    length = 3 * pairs + 2 * rewritten + filler + seed % 3
    config = overwrite_config(
        generator_seed=seed, num_pairs=pairs, num_rewritten=rewritten, filler_length=filler, block_length=length
    )
    assert config.check(None) == []  # type: ignore[arg-type]

    rows = draw(config)

    for row, position, target, slice_names in asked(rows):
        value, place = last_value(row, position)
        writings = row[:position].count(row[position])
        low, _, high = slice_names["gap_tokens"].partition("-")
        assert target == value
        assert slice_names["written"] == {1: "once", 2: "twice"}[writings]
        assert (place > 2 * pairs + filler) == (writings == 2)
        assert int(low) <= position - place <= int(high or low)
    twice = [names["written"] for *_, names in asked(rows)].count("twice")
    assert twice == rewritten * len(rows.inputs)
    assert rows.outdated is not None
    assert ((rows.outdated != NO_TARGET).sum(axis=1) == rewritten).all()
    for number, (row, position, target, names) in enumerate(asked(rows)):
        outdated = rows.outdated[number // pairs][position]
        first = row[row.index(row[position]) + 1]
        assert outdated == (first if names["written"] == "twice" else NO_TARGET)
        assert outdated != target


@pytest.mark.parametrize("filler", ["random", "zero"])
def test_longer_overwrite_rows_have_the_two_writings_farther_apart(filler: str) -> None:
    config = overwrite_config(filler=filler)

    longer = config.of_length(64)

    assert (longer.block_length, longer.filler_length) == (64, config.filler_length + 40)
    assert config.of_length(23).filler_length == config.filler_length - 1
    rows = draw(longer)
    for row, position, target, names in asked(rows):
        value, place = last_value(row, position)
        assert target == value
        assert (place > 8 + longer.filler_length) == (names["written"] == "twice")
    between = rows.inputs[:, 8 : 8 + longer.filler_length]
    assert (between == 0).all() == (filler == "zero")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(1, 4), spare=st.integers(0, 20), segment=st.integers(1, 7))
def test_passkey_asks_for_what_follows_the_first_mark(seed: int, length: int, spare: int, segment: int) -> None:
    block = 2 * length + 1 + spare
    config = passkey_config(
        generator_seed=seed, passkey_length=length, block_length=block, segment_length=segment, vocab_size=4000
    )
    assert config.check(None) == []  # type: ignore[arg-type]

    rows = draw(config)

    for row, labels in zip(rows.inputs.tolist(), rows.labels.tolist(), strict=True):
        first, second = (place for place, token in enumerate(row) if token == 0)
        assert second == block - length
        assert labels == [NO_TARGET] * second + row[first + 1 : first + 1 + length]
        assert row[second + 1 :] == labels[second:-1]
    for row, _, _, slice_names in asked(rows):
        first = row.index(0)
        low, _, high = slice_names["segments"].partition("-")
        crossed = sum(place % segment == 0 for place in range(first + length + 1, block - length + 1))
        assert int(low) <= crossed <= int(high or low)
        tenth = int(slice_names["depth"].split("-")[0]) / 100
        assert tenth <= first / (block - 2 * length) < tenth + 0.1001


def test_parity_counts_ones() -> None:
    rows = draw(tracking_config(group="parity"))

    assert np.array_equal(rows.labels, rows.inputs.cumsum(axis=1) % 2)
    assert rows.slice_names[rows.slices[0, 0]] == {"position": "0"}
    assert rows.slice_names[rows.slices[5, 12]] == {"position": "8-15"}


def test_products_of_s3_follow_three_objects() -> None:
    moves = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]  # where each object goes
    rows = draw(tracking_config())

    for row, labels in zip(rows.inputs.tolist(), rows.labels.tolist(), strict=True):
        places = (0, 1, 2)
        for element, label in zip(row, labels, strict=True):
            places = tuple(moves[element][place] for place in places)
            assert moves[label] == places
    table = product_table("s3")
    assert (table != table.T).any()
    assert all(sorted(line) == list(range(6)) for line in [*table.tolist(), *table.T.tolist()])


@probes
def test_batches_name_the_slice_of_every_target_and_of_nothing_else(make: Callable[..., Any]) -> None:
    data = prepare(make())

    batch = data.train.__getitems__([3, 0])

    has_target = batch["labels"] != NO_TARGET
    assert torch.equal(batch["slice"] != NO_SLICE, has_target)
    assert batch["slice"].max() < len(data.facts["slices"])
    assert has_target.any(dim=1).all()
    assert batch["sample_id"].tolist() == [3, 0]
    assert batch["starts_text"].sum(1).tolist() == [1, 1]
    assert batch["starts_text"][:, 0].all()
    assert count_tokens_read(batch) == batch["input_ids"].numel()  # targets or not, all are read
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "slice", "sample_id"))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["slice"].shape


@probes
def test_splits_are_disjoint_and_counted(make: Callable[..., Any]) -> None:
    data = prepare(make(num_samples=20))

    splits = [data.train, data.validation, data.test]
    rows = [{tuple(row) for row in split.__getitems__(range(len(split)))["input_ids"].tolist()} for split in splits]
    assert [len(part) for part in rows] == [12, 4, 4]
    assert len(set.union(*rows)) == 20
    assert not data.train_document_hashes & data.validation_document_hashes
    labels = data.validation.__getitems__(range(4))["labels"]
    assert data.facts["splits"]["validation"]["targets"] == int((labels != NO_TARGET).sum())
    assert labels.max() < data.vocab_size
    assert json.loads(json.dumps(data.facts)) == data.facts


@probes
def test_the_fingerprint_names_what_is_drawn(make: Callable[..., Any]) -> None:
    first, again = prepare(make()), prepare(make())
    others = [
        prepare(make(**change)) for change in ({"generator_seed": 4}, {"block_length": 25}, {"max_train_blocks": 2})
    ]

    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


@probes
def test_rows_that_must_repeat_are_refused(make: Callable[..., Any]) -> None:
    config = make(num_samples=12)
    rows = draw(config)
    rows.inputs[7] = rows.inputs[2]
    recall = importlib.import_module("newllm.data.recall")

    with pytest.raises(ValueError, match=r"data.num_samples=12: only 11 rows differ at data.block_length="):
        recall.prepare_rows(config, rows, num_samples=12, vocab_size=30, num_answers=15, source="a test")


def test_ids_unseen_in_training_are_counted() -> None:
    config = mqar_config()
    rows = draw(config)
    rows.inputs[:] = rows.inputs % 5 + np.arange(12)[:, None] // 10  # rows differ; only the last two may hold a 5
    rows.labels[:] = NO_TARGET
    rows.inputs[7:10, 0] = [11, 12, 13]  # 7 training rows of 12 at these shares: 8 and 9 validate

    data = importlib.import_module("newllm.data.recall").prepare_rows(
        config, rows, num_samples=12, vocab_size=20, num_answers=10, source="a test"
    )

    validation = len(data.validation)
    seen = set(data.train.rows.inputs.ravel().tolist())
    ids = data.validation.__getitems__(range(validation))["input_ids"].flatten().tolist()
    assert data.facts["unseen_share"] == pytest.approx(sum(token not in seen for token in ids) / len(ids))
    assert data.facts["unseen_share"] > 0


def test_buckets_double() -> None:
    axis = doubling("gap_tokens", np.array([0, 1, 2, 3, 4, 7, 8]))

    assert axis.index.tolist() == [0, 1, 2, 2, 3, 3, 4]
    assert list(axis.values) == ["0", "1", "2-3", "4-7", "8-15"]


def test_a_slice_is_one_bucket_of_every_axis() -> None:
    axes = [Axis("depth", ["low", "high"], np.array([0, 1, 1])), Axis("segments", ["0", "1", "2"], np.array([2, 0, 2]))]

    numbers, names = slices_of(axes)

    assert [names[number] for number in numbers] == [
        {"depth": "low", "segments": "2"},
        {"depth": "high", "segments": "0"},
        {"depth": "high", "segments": "2"},
    ]
    assert len(names) == 6


def test_near_gaps_are_likelier_the_smaller_the_power() -> None:
    gaps = [draw_gaps(np.random.default_rng(0), (2000, 1), 8, power)[:, 0] for power in (0.01, 1.0)]

    shares = [np.bincount(drawn, minlength=8) / 2000 for drawn in gaps]
    density = np.arange(1, 9) ** -0.99
    assert np.abs(shares[0] - density / density.sum()).max() < 0.03  # two deviations of 2000 draws
    assert np.abs(shares[1] - 1 / 8).max() < 0.03


def test_gaps_and_ids_of_a_row_differ() -> None:
    generator = np.random.default_rng(0)

    gaps = draw_gaps(generator, (50, 5), 5, 0.01)
    ids = distinct(generator, 50, range(3, 8), 5)
    free = other_ids(generator, np.array([[1, 2], [4, 2]]), 40, 6)

    assert (np.sort(gaps, axis=1) == np.arange(5)).all()
    assert (np.sort(ids, axis=1) == np.arange(3, 8)).all()
    assert [set(row) for row in free.tolist()] == [{3, 4, 5}, {1, 3, 5}]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["data=mqar", "data.num_pairs=33"],
            "data.num_pairs=33: does not fit into rows of data.block_length=128, with four positions a pair. "
            "Allowed: 1 to 32. Lower data.num_pairs or raise data.block_length.",
        ),
        (
            ["data=mqar", "data.vocab_size=32"],
            "data.num_pairs=16: is more than the 15 keys of data.vocab_size=32. Allowed: at most half the vocabulary "
            "less one. Lower data.num_pairs or raise data.vocab_size.",
        ),
        (
            ["data=passkey", "data.block_length=8"],
            "data.passkey_length=4: needs 9 positions, data.block_length=8. Allowed: 1 to 3. "
            "Lower data.passkey_length or raise data.block_length.",
        ),
        (
            ["data=overwrite", "data.filler_length=193"],
            "data.block_length=256: is too short for data.num_pairs=16, data.num_rewritten=8 and data.filler_length=193. "
            "Allowed: at least 257. Raise it or lower one of these.",
        ),
        (
            ["data=overwrite", "data.num_rewritten=17"],
            "data.num_rewritten=17: is more than data.num_pairs=16. Allowed: 1 to 16. "
            "Lower data.num_rewritten or raise data.num_pairs.",
        ),
        (
            ["data=overwrite", "data.vocab_size=49"],
            "data.vocab_size=49: is too small for rows of 24 different values. Allowed: at least 50. "
            "Raise it or lower data.num_pairs.",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_what_is_possible(overrides: list[str], problem: str) -> None:
    assert examine(overrides, "train")[1] == [problem]


def test_the_largest_sizes_that_are_allowed_can_be_drawn() -> None:
    tight: list[Any] = [
        mqar_config(block_length=12, num_pairs=3, vocab_size=8),
        passkey_config(block_length=5, vocab_size=4, num_samples=6),
        overwrite_config(block_length=21, vocab_size=14),
    ]

    for config in tight:
        assert config.check(None) == []
        assert draw(config).inputs.shape == (config.num_samples, config.block_length)
        assert dataclasses.replace(config, block_length=config.block_length - 1).check(None) != []
