"""The single positions of a stream of text, for procedures that keep something for each of them.

    stream      a0 a1 a2 EOS b0 b1        position 4 reads b0, is to predict b1, and begins a text
    its last 3 tokens                     a2 EOS b0, of which only b0 belongs to its text

N: positions. k: last tokens of a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from newllm.data.blocks import Blocks
from newllm.data.prepared import Batch, Samples


@dataclass(frozen=True)
class PositionReading:
    """How positions are read.

    Attributes:
        batch_size: positions of a batch.
        num_input_tokens: k.
        reset_at_text: what came before a text is not read in it; otherwise the stream is one text.
        shuffle: training positions in a new order each epoch; otherwise in the stream's.
        held_out: validation positions come like that too, in the stream's order; otherwise validation has its blocks.
    """

    batch_size: int
    num_input_tokens: int
    reset_at_text: bool
    shuffle: bool
    held_out: bool


class Positions:
    """The positions that blocks of a stream read, each once; the number of a position is its place in the stream.

    Args:
        blocks: the blocks; their borders are of no meaning here.
        num_input_tokens: k.
        reset_at_text: what came before a text is not read in it.
    """

    def __init__(self, blocks: Blocks, *, num_input_tokens: int, reset_at_text: bool) -> None:
        self.stream, self.eos_id, self.reset_at_text = blocks.stream, blocks.eos_id, reset_at_text
        self.num_positions = len(blocks) * blocks.block_length
        self._window = np.arange(1 - num_input_tokens, 1)

    def __len__(self) -> int:
        return self.num_positions

    def __getitems__(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """Return the batch of n positions, as one row.

        Returns:
            input_ids, labels, position [1, n], int64; window_ids [1, n, k], the last k tokens, oldest first, and is_read
            [1, n, k], False where one belongs to an earlier text or stands before the stream; starts_text [1, n], True where
            nothing before is read.
        """
        positions_N = np.asarray(positions, dtype=np.int64)
        places = positions_N[:, None] + self._window  # [n, k]
        tokens = self.stream[np.maximum(places, 0)].astype(np.int64)
        starts = places <= 0
        if self.reset_at_text:
            starts |= self.stream[np.maximum(places - 1, 0)] == self.eos_id
        # A token is read unless a text begins behind it.
        behind: np.ndarray = np.cumsum(starts[:, ::-1], axis=1)[:, ::-1] - starts
        is_read = (behind == 0) & (places >= 0)
        row = {
            "input_ids": tokens[:, -1],
            "labels": self.stream[positions_N + 1].astype(np.int64),
            "position": positions_N,
            "window_ids": tokens,
            "is_read": is_read,
            "starts_text": starts[:, -1],
        }
        return {name: torch.from_numpy(np.ascontiguousarray(values)[None]) for name, values in row.items()}


def positions_of(samples: Samples, *, num_input_tokens: int, reset_at_text: bool) -> Positions:
    """Return the positions of a split.

    Raises:
        ValueError: the samples are no running text.
    """
    if not isinstance(samples, Blocks):
        raise ValueError(
            "data: gives samples of their own, no text whose positions follow each other. Allowed: sources of text. "
            "Choose data=bible, stdlib or jsonl."
        )
    return Positions(samples, num_input_tokens=num_input_tokens, reset_at_text=reset_at_text)
