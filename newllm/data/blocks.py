"""A stream of tokens cut into blocks. The one place where targets are shifted against inputs.

    stream   a0 a1 a2 a3 a4 a5 a6 a7 a8 a9       T = 3
    block 0  a0 a1 a2 a3                         inputs a0 a1 a2, labels a1 a2 a3
    block 1           a3 a4 a5 a6                inputs a3 a4 a5, labels a4 a5 a6
    block 2                    a6 a7 a8 a9       inputs a6 a7 a8, labels a7 a8 a9

Each token but the first is a target exactly once; a tail shorter than a block is left out and counted.
"""

from collections.abc import Sequence

import numpy as np
import torch

from newllm.data.prepared import Batch


def count_blocks(num_tokens: int, block_length: int, *, max_blocks: int | None = None) -> int:
    """Return how many blocks of `block_length` targets a stream gives."""
    num_blocks = max(0, num_tokens - 1) // block_length
    return num_blocks if max_blocks is None else min(num_blocks, max_blocks)


def count_used_tokens(num_blocks: int, block_length: int) -> int:
    """Return how many tokens of the stream the blocks hold; blocks share the token where they meet."""
    return num_blocks * block_length + 1 if num_blocks > 0 else 0


class Blocks:
    """The blocks of a stream, fetched a whole batch at a time.

    Args:
        stream: token ids, any integer type, possibly memory-mapped.
        block_length: inputs, and targets, of one block (T).
        num_blocks: how many blocks to offer, from the beginning.
        eos_id: the token after each text; the token behind it starts a text.
    """

    def __init__(self, stream: np.ndarray, *, block_length: int, num_blocks: int, eos_id: int) -> None:
        assert num_blocks <= count_blocks(len(stream), block_length), "more blocks than the stream holds"
        self.stream = stream
        self.block_length = block_length
        self.num_blocks = num_blocks
        self.eos_id = eos_id

    def __len__(self) -> int:
        return self.num_blocks

    def __getitems__(self, sample_ids: Sequence[int]) -> Batch:
        """Return the batch of these blocks.

        Returns:
            input_ids, labels [B, T], sample_id [B], int64; starts_text [B, T], True where an input begins a text.
        """
        ids_B = np.asarray(sample_ids, dtype=np.int64)
        window = np.arange(-1, self.block_length + 1)
        positions = ids_B[:, None] * self.block_length + window  # [B, T + 2], from the token before the block
        tokens = self.stream[np.maximum(positions, 0)].astype(np.int64)
        starts_text = tokens[:, :-2] == self.eos_id  # [B, T]
        starts_text[ids_B == 0, 0] = True
        return {
            "input_ids": torch.from_numpy(tokens[:, 1:-1].copy()),
            "labels": torch.from_numpy(tokens[:, 2:].copy()),
            "sample_id": torch.from_numpy(ids_B.copy()),
            "starts_text": torch.from_numpy(starts_text),
        }
