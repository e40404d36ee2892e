from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_texts import BYTES, delay_config, jsonl_config, write_jsonl

from newllm.data.lanes import LaneBatches, TextBlocks, lane_groups, lanes_beside, plan_lanes
from newllm.data.loader import PositionLoader
from newllm.data.module import TextDataModule
from newllm.data.prepared import NO_TARGET, count_tokens_read

EOS = 0
# texts of 5, 2 and 7 targets, one that is empty, and one cut short before its EOS
STREAM = np.array([1, 2, 3, 4, 5, EOS, 6, 7, EOS, EOS, 1, 2, 3, 4, 5, 6, 7, EOS, 8, 9], dtype=np.uint16)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", num_documents=14)


def lanes(corpus: Path, **changes) -> TextDataModule:
    data = TextDataModule(jsonl_config(corpus, **changes), BYTES, seed=0, in_lanes=True)
    data.prepare()
    return data


def take(loader: PositionLoader, num_batches: int) -> list[dict[str, torch.Tensor]]:
    batches: list[dict[str, torch.Tensor]] = []
    while len(batches) < num_batches:
        batches += islice(loader, num_batches - len(batches))
    return batches


def test_texts_are_cut_from_their_own_beginning_and_padding_is_no_target():
    blocks = TextBlocks(STREAM, block_length=3, eos_id=EOS)

    batch = blocks.__getitems__(range(len(blocks)))

    inputs = [[1, 2, 3], [4, 5, EOS], [6, 7, EOS], [1, 2, 3], [4, 5, 6], [7, EOS, EOS], [8, 9, EOS]]
    no = NO_TARGET
    labels = [[2, 3, 4], [5, EOS, no], [7, EOS, no], [2, 3, 4], [5, 6, 7], [EOS, no, no], [9, no, no]]
    assert batch["input_ids"].tolist() == inputs
    assert batch["labels"].tolist() == labels
    assert batch["starts_text"][:, 0].tolist() == [True, False, True, True, False, False, True]
    assert not batch["starts_text"][:, 1:].any()
    assert batch["is_padding"].tolist() == [[label == NO_TARGET for label in row] for row in labels]
    assert blocks.num_targets == count_tokens_read(batch) == int((batch["labels"] != NO_TARGET).sum()) == 15


@pytest.mark.parametrize("shuffle", [False, True])
def test_blocks_of_a_text_follow_each_other_in_one_row(corpus: Path, shuffle: bool):
    data = lanes(corpus, shuffle=shuffle)
    expected = dict.fromkeys(range(3), None)
    seen = []

    for batch in data.train_dataloader():
        starts_text = batch["starts_text"][:, 0].tolist()
        for row, (sample_id, starts) in enumerate(zip(batch["sample_id"].tolist(), starts_text, strict=True)):
            assert starts or sample_id == expected[row] + 1
            expected[row] = sample_id
            seen.append(sample_id)

    assert sorted(seen) == list(range(data.num_train_samples))


def test_rows_that_end_are_the_last_ones_and_lanes_are_about_equally_long(corpus: Path):
    data = lanes(corpus)

    sizes = [len(batch["sample_id"]) for batch in data.train_dataloader()]

    assert sizes == sorted(sizes, reverse=True)
    longest_text = int(data.prepared.train.blocks_per_text.max())
    assert sizes.count(3) >= len(sizes) - longest_text
    assert len(data.train_dataloader()) == len(sizes)


def test_epochs_differ_in_order_and_agree_in_length(corpus: Path):
    loader = lanes(corpus).train_dataloader()

    first, second = ([batch["sample_id"].tolist() for batch in loader] for _ in range(2))

    assert first != second
    assert len(first) == len(second) == len(loader)


def test_longest_texts_are_shared_out_first():
    assert plan_lanes(np.array([1, 5, 2, 4]), 2) == [[0, 1], [2, 3]]
    assert plan_lanes(np.array([3, 1]), 4) == [[0], [1]]


@pytest.mark.parametrize("stops", [(5, 9), (0, 6), (70, 3)])
@pytest.mark.parametrize("workers", [(0, 0, 0), (2, 0, 1)])
def test_resuming_twice_gives_the_batches_of_an_uninterrupted_run(
    corpus: Path, stops: tuple[int, int], workers: tuple[int, int, int]
):
    straight = take(lanes(corpus).train_dataloader(), sum(stops) + 90)

    batches, state = [], None
    for count, num_workers in zip((*stops, 90), workers, strict=True):
        loader = lanes(corpus, num_workers=num_workers).train_dataloader()
        if state is not None:
            loader.load_state_dict(state)
        batches += take(loader, count)
        state = loader.state_dict()

    for batch, same in zip(batches, straight, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in same)


def test_ranks_share_the_lanes_of_one_process():
    blocks = TextBlocks(np.tile(STREAM, 5), block_length=3, eos_id=EOS)
    alone = LaneBatches(blocks, 5, seed=0, shuffle=True)
    ranks = [LaneBatches(blocks, 5, seed=0, shuffle=True, rank=rank, world_size=2) for rank in range(2)]

    whole, shares = list(alone), [list(rank) for rank in ranks]

    for number, batch in enumerate(zip(*shares, strict=True)):
        assert [batch[row % 2][row // 2] for row in range(len(whole[number]))] == whole[number]
    assert len(ranks[0]) == len(ranks[1]) == len(shares[0])
    assert all(len(batch) < 2 for batch in whole[len(shares[0]) :])
    assert ranks[0].batches_in_epoch == alone.batches_in_epoch == len(whole)
    with pytest.raises(ValueError, match=r"runtime.devices=40: are more than the 16 lanes of texts"):
        LaneBatches(blocks, 80, seed=0, shuffle=True, rank=0, world_size=40)


def test_ranks_leave_out_no_block_of_held_out_lanes():
    blocks = TextBlocks(np.tile(STREAM, 5), block_length=3, eos_id=EOS)
    ranks = [
        LaneBatches(blocks, 7, seed=0, shuffle=False, rank=rank, world_size=4, is_held_out=True) for rank in range(4)
    ]

    read = [[block for batch in rank for block in batch] for rank in ranks]

    assert sorted(read[0] + read[1] + read[2]) == list(range(len(blocks)))
    assert read[3] == read[0]
    assert [len(next(rank)) for rank in map(iter, ranks)] == [2, 2, 3, 2]


def test_lanes_lie_two_and_two():
    assert [list(map(list, lane_groups(count))) for count in (1, 2, 3, 5)] == [
        *([[0]], [[0, 1]], [[0, 1, 2]], [[0, 1], [2, 3, 4]]),
    ]
    assert [lanes_beside(count) for count in (1, 2, 5)] == [[0], [1, 0], [1, 0, 3, 4, 2]]


def test_facts_count_what_lanes_hold(corpus: Path):
    data = lanes(corpus)

    for split, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        labels = torch.cat([batch["labels"].flatten() for batch in loader])
        targets = labels[labels != NO_TARGET]
        facts = data.facts["splits"][split]
        assert (facts["targets"], facts["bytes"]) == (len(targets), int(data.token_bytes[targets].sum()))
        assert facts["texts"] == facts["documents"]


def test_a_text_alone_is_one_lane_and_said(corpus: Path):
    with pytest.warns(UserWarning, match="data.batch_size=30: there are 8 training texts"):
        data = lanes(corpus, batch_size=30)

    assert len(next(iter(data.train_dataloader()))["sample_id"]) == 8


def test_batches_in_lanes_are_other_data_and_rows_without_text_are_refused(corpus: Path, tmp_path: Path):
    packed = TextDataModule(jsonl_config(corpus), BYTES, seed=0)
    packed.prepare()

    assert packed.fingerprint != lanes(corpus).fingerprint
    with pytest.raises(ValueError, match=r"data.kind=delay_copy: gives samples of their own"):
        TextDataModule(delay_config(tmp_path), BYTES, seed=0, in_lanes=True).prepare()
