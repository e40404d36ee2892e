"""A passkey somewhere in a long filler, asked for at the end: recall by depth and by segments since it was written.

N: rows. k: tokens of the passkey.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from newllm.config.fields import Count, Range
from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.prepared import PreparedData
from newllm.data.recall import Axis, ProbeConfig, Rows, doubling, place_targets, prepare_rows

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig

MARK = 0  # stands before the passkey, and asks for it
DEPTHS = 10  # buckets of the place in the row


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig(ProbeConfig, DataConfig):
    """Filler, mark and passkey, filler, mark; the targets are the tokens of the passkey.

    Attributes:
        vocab_size: V; filler is 1 to V/2 - 1, tokens of passkeys V/2 to V - 1.
        passkey_length: k, tokens; all but the last are given again as input where they are asked.
        segment_length: tokens that count as one segment in the names of the slices.
    """

    vocab_size: Annotated[int, Range(minimum=4, maximum=2**22)]
    passkey_length: Count
    segment_length: Count

    def check(self, config: "TrainConfig") -> list[str]:
        """A row holds mark and passkey, and the query."""
        needed = 2 * self.passkey_length + 1
        if needed <= self.block_length:
            return []
        return [
            f"data.passkey_length={self.passkey_length}: needs {needed} positions, data.block_length={self.block_length}. "
            f"Allowed: 1 to {(self.block_length - 1) // 2}. Lower data.passkey_length or raise data.block_length."
        ]


def draw_rows(data: PasskeyConfig) -> Rows:
    """Return the rows of a configuration, sliced by depth and by segments between the passkey and the query."""
    generator = np.random.default_rng(data.generator_seed)
    rows, length, half = data.num_samples, data.passkey_length, data.vocab_size // 2
    inputs = generator.integers(1, half, size=(rows, data.block_length), dtype=np.int32)
    passkeys = generator.integers(half, data.vocab_size, size=(rows, length), dtype=np.int32)
    marked = np.concatenate([np.full((rows, 1), MARK, dtype=np.int32), passkeys], axis=1)  # [N, k + 1]
    asked = data.block_length - length
    starts = generator.integers(0, asked - length, size=(rows, 1))
    np.put_along_axis(inputs, starts + np.arange(length + 1), marked, axis=1)
    inputs[:, asked:] = marked[:, :-1]
    depths = starts * DEPTHS // (asked - length)
    segments = asked // data.segment_length - (starts + length) // data.segment_length
    names = [f"{100 * depth // DEPTHS}-{100 * (depth + 1) // DEPTHS} %" for depth in range(DEPTHS)]
    axes = [Axis("depth", names, depths), doubling("segments", segments)]
    each = [Axis(axis.name, axis.values, np.repeat(axis.index, length, axis=1)) for axis in axes]
    positions = np.broadcast_to(np.arange(asked, data.block_length), (rows, length))
    return place_targets(inputs, positions, passkeys, each)


def prepare(data: PasskeyConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the generated rows; the tokenizer configuration plays no part."""
    return prepare_rows(
        data,
        draw_rows(data),
        num_samples=data.num_samples,
        vocab_size=data.vocab_size,
        num_answers=data.vocab_size - data.vocab_size // 2,
        source=f"passkey, {data.passkey_length} tokens, seed {data.generator_seed}",
    )
