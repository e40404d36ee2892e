import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from small_texts import prepared, write_jsonl

from newllm.data.loader import EpochBatches, PositionLoader
from newllm.data.module import TextDataModule

Epoch = list[dict[str, torch.Tensor]]


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    return prepared(write_jsonl(tmp_path / "corpus.jsonl"), max_train_blocks=40, batch_size=3)


def with_workers(data: TextDataModule, num_workers: int) -> PositionLoader:
    """Return a fresh loader, as after a restart of the program."""
    config = data.data_config
    object.__setattr__(config, "num_workers", num_workers)
    return data.train_dataloader()


def take(loader: PositionLoader, num_batches: int) -> Epoch:
    """Return the next batches, across the ends of epochs as a training loop goes."""
    batches: Epoch = []
    while len(batches) < num_batches:
        batches += islice(loader, num_batches - len(batches))
    return batches


def assert_equal(one: Epoch, other: Epoch) -> None:
    assert len(one) == len(other)
    for batch, same in zip(one, other, strict=True):
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[name], same[name]) for name in batch)


def sample_ids(batches: Epoch) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch["sample_id"].tolist()]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(data: TextDataModule) -> None:
    loader = data.train_dataloader()

    first, second = list(loader), list(loader)

    assert sorted(sample_ids(first)) == sorted(sample_ids(second)) == list(range(40))
    assert sample_ids(first) != sample_ids(second)
    assert [len(batch["sample_id"]) for batch in first] == [3] * 13 + [1]
    assert len(loader) == 14


def test_the_order_is_a_function_of_seed_and_epoch(data: TextDataModule) -> None:
    one, same = EpochBatches(40, 3, seed=1, shuffle=True), EpochBatches(40, 3, seed=1, shuffle=True)
    other = EpochBatches(40, 3, seed=2, shuffle=True)

    assert one.order(5).tolist() == same.order(5).tolist()
    assert one.order(5).tolist() != one.order(6).tolist()
    assert one.order(5).tolist() != other.order(5).tolist()


def test_without_shuffle_samples_come_in_their_order() -> None:
    assert list(EpochBatches(5, 2, seed=0, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_workers_do_not_change_the_batches(data: TextDataModule) -> None:
    assert_equal(take(with_workers(data, 0), 30), take(with_workers(data, 2), 30))


# 14 batches an epoch: inside the first, at its very end, inside the second, at the beginning, after two
@pytest.mark.parametrize("stops", [(5, 9), (14, 3), (20, 1), (0, 6), (28, 14)])
@pytest.mark.parametrize("workers", [(2, 2, 2), (0, 0, 0), (2, 0, 1)])
def test_resuming_twice_gives_the_batches_of_an_uninterrupted_run(
    data: TextDataModule, stops: tuple[int, int], workers: tuple[int, int, int]
) -> None:
    first, second = stops
    straight = take(with_workers(data, 0), first + second + 20)

    loader = with_workers(data, workers[0])
    batches = take(loader, first)
    resumed = with_workers(data, workers[1])
    resumed.load_state_dict(loader.state_dict())
    batches += take(resumed, second)
    again = with_workers(data, workers[2])
    again.load_state_dict(resumed.state_dict())
    batches += take(again, 20)

    assert_equal(batches, straight)


def test_a_state_taken_in_the_middle_of_a_loop_is_that_of_the_last_batch_handed_out(data: TextDataModule) -> None:
    loader = with_workers(data, 2)
    iterator = iter(loader)
    for _ in range(4):  # two processes have fetched further batches by now
        next(iterator)

    assert loader.state_dict() == {"epoch": 0, "batches_done": 4, "num_batches": 14}


def test_reading_the_state_changes_nothing(data: TextDataModule) -> None:
    straight = take(with_workers(data, 2), 20)

    loader = with_workers(data, 2)
    batches = []
    for number in range(20):
        loader.state_dict()
        if number % 14 == 0:
            iterator = iter(loader)
        batches.append(next(iterator))
        loader.state_dict()

    assert_equal(batches, straight)


def test_the_loader_draws_nothing_from_the_global_generator(data: TextDataModule) -> None:
    before = torch.random.get_rng_state()

    take(with_workers(data, 2), 20)
    list(data.val_dataloader())

    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_position_in_other_data_is_refused(data: TextDataModule) -> None:
    loader = data.train_dataloader()

    with pytest.raises(ValueError, match=r"counts 9 batches in an epoch, this run has 14. Allowed: the same data"):
        loader.load_state_dict({"epoch": 0, "batches_done": 1, "num_batches": 9})


def ranks_of(world_size: int, num_samples: int, batch_size: int, **options: bool) -> list[EpochBatches]:
    return [
        EpochBatches(num_samples, batch_size, seed=0, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 4), (3, 3)])
def test_ranks_share_the_batches_of_one_process(world_size: int, batch_size: int) -> None:
    [alone] = ranks_of(1, 14, batch_size, shuffle=True)
    ranks = ranks_of(world_size, 14, batch_size, shuffle=True)

    for _ in range(2):  # epochs
        whole, shares = list(alone), [list(rank) for rank in ranks]
        joined = [sorted(sample for share in batch for sample in share) for batch in zip(*shares, strict=True)]
        assert joined == [sorted(batch) for batch in whole if len(batch) >= world_size]
        assert all(share for batches in shares for share in batches)
        assert [len(rank) for rank in ranks] == [len(joined)] * world_size


def test_a_position_may_be_continued_by_another_number_of_ranks() -> None:
    ranks = ranks_of(3, 14, 4, shuffle=True)  # the last batch has two samples: left out

    assert {rank.batches_in_epoch for rank in ranks} == {4}
    assert {len(rank) for rank in ranks} == {3}


def test_held_out_batches_are_shared_whole_and_none_is_left_out() -> None:
    whole = list(ranks_of(1, 14, 4, shuffle=False)[0])

    shares = [list(rank) for rank in ranks_of(3, 14, 4, shuffle=False, is_held_out=True)]
    too_many = [list(rank) for rank in ranks_of(6, 14, 4, shuffle=False, is_held_out=True)]

    assert shares == [[whole[0], whole[3]], [whole[1]], [whole[2]]]
    assert too_many == [[whole[0]], [whole[1]], [whole[2]], [whole[3]], [whole[0]], [whole[1]]]


def test_a_program_that_fails_while_loading_ends(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from small_texts import prepared, write_jsonl; "
        f"data = prepared(write_jsonl(Path({str(tmp_path)!r}) / 'corpus.jsonl'), num_workers=2); "
        "batches = iter(data.train_dataloader()); next(batches); raise RuntimeError('on purpose')"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: on purpose")
