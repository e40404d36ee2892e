"""Single positions of a stream: what each reads, and that each comes once."""

import numpy as np
import pytest
import torch

from newllm.data.blocks import Blocks
from newllm.data.loader import EpochBatches, make_loader
from newllm.data.positions import Positions, positions_of

EOS = 9
STREAM = np.array([1, 2, EOS, 3, 4, 5, EOS, EOS, 6], dtype=np.uint16)


def positions(k: int, *, reset_at_text: bool = True) -> Positions:
    blocks = Blocks(STREAM, block_length=4, num_blocks=2, eos_id=EOS)
    return Positions(blocks, num_input_tokens=k, reset_at_text=reset_at_text)


def test_windows_end_where_their_text_begins():
    row = positions(3).__getitems__([0, 1, 3, 5, 7])

    assert row["input_ids"].tolist() == [[1, 2, 3, 5, EOS]]
    assert row["labels"].tolist() == [[2, EOS, 4, EOS, 6]]
    assert row["starts_text"].tolist() == [[True, False, True, False, True]]
    read = [
        [token for token, is_read in zip(tokens, reads, strict=True) if is_read]
        for tokens, reads in zip(row["window_ids"][0].tolist(), row["is_read"][0].tolist(), strict=True)
    ]
    assert read == [[1], [1, 2], [3], [3, 4, 5], [EOS]]


def test_without_resets_the_stream_is_one_text():
    row = positions(3, reset_at_text=False).__getitems__(range(8))

    assert row["starts_text"].tolist() == [[True] + [False] * 7]
    assert row["is_read"].sum(-1).tolist() == [[1, 2, 3, 3, 3, 3, 3, 3]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_position_comes_once_in_an_epoch(shuffle: bool):
    samples = positions(1)
    loader = make_loader(samples, EpochBatches(8, 3, seed=1, shuffle=shuffle), num_workers=0, pin_memory=False)

    seen = torch.cat([batch["position"][0] for batch in loader]).tolist()

    assert sorted(seen) == list(range(8))
    assert (seen == list(range(8))) is not shuffle


def test_samples_without_text_are_refused():
    with pytest.raises(ValueError, match="no text whose positions follow each other"):
        positions_of([], num_input_tokens=1, reset_at_text=True)
