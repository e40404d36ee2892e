import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.data.blocks import Blocks, count_blocks, count_used_tokens

EOS = 0


def cut(stream: list[int], block_length: int, max_blocks: int | None = None) -> Blocks:
    num_blocks = count_blocks(len(stream), block_length, max_blocks=max_blocks)
    return Blocks(np.array(stream, dtype=np.uint16), block_length=block_length, num_blocks=num_blocks, eos_id=EOS)


@given(length=st.integers(2, 60), block_length=st.integers(1, 9))
def test_every_token_but_the_first_is_a_target_exactly_once(length: int, block_length: int) -> None:
    stream = list(range(1, length + 1))
    blocks = cut(stream, block_length)

    labels = blocks.__getitems__(range(len(blocks)))["labels"].flatten().tolist()

    num_used = count_used_tokens(len(blocks), block_length)
    assert labels == stream[1:num_used]
    assert length - num_used < block_length or len(blocks) == 0


@given(length=st.integers(2, 60), block_length=st.integers(1, 9))
def test_labels_are_inputs_moved_by_one(length: int, block_length: int) -> None:
    blocks = cut(list(range(1, length + 1)), block_length)

    batch = blocks.__getitems__(range(len(blocks)))

    flat_inputs, flat_labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    assert flat_inputs[1:].tolist() == flat_labels[:-1].tolist()


def test_batch_holds_the_asked_blocks_in_the_asked_order() -> None:
    batch = cut(list(range(10, 20)), 3).__getitems__([2, 0])

    assert batch["input_ids"].tolist() == [[16, 17, 18], [10, 11, 12]]
    assert batch["labels"].tolist() == [[17, 18, 19], [11, 12, 13]]
    assert batch["sample_id"].tolist() == [2, 0]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "sample_id": torch.int64,
        "starts_text": torch.bool,
    }


def test_starts_text_marks_the_token_after_each_end_also_across_blocks() -> None:
    #         block 0        block 1        block 2
    stream = [5, 6, EOS, 7, EOS, EOS, 8, 9, EOS, 4]

    batch = cut(stream, 3).__getitems__([0, 1, 2])

    assert batch["starts_text"].tolist() == [[True, False, False], [True, False, True], [True, False, False]]


def test_limit_keeps_the_first_blocks() -> None:
    blocks = cut(list(range(1, 50)), 4, max_blocks=2)

    assert len(blocks) == 2
    assert blocks.__getitems__([1])["input_ids"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_tail_shorter_than_a_block_gives_none(num_tokens: int, num_blocks: int) -> None:
    assert count_blocks(num_tokens, 4) == num_blocks


def test_a_block_longer_than_memory_is_no_block_of_a_short_stream() -> None:
    assert len(cut([1, 2, 3], 10**12)) == 0
