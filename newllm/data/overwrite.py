"""Keys written, some of them once more after a filler, then all asked: the value written last is the target.

N: rows. P: pairs of a row. R: pairs that are written again.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np

from newllm.config.fields import Count, Range
from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.prepared import NO_TARGET, PreparedData
from newllm.data.recall import (
    Axis,
    ProbeConfig,
    Rows,
    distinct,
    doubling,
    filler_ids,
    place_targets,
    prepare_rows,
)

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class OverwriteConfig(ProbeConfig, DataConfig):
    """P pairs, filler, R of the keys with other values, filler to the end but for the last P positions, all keys.

    Attributes:
        vocab_size: V; keys are 1 to V/2 - 1, values V/2 to V - 1.
        num_pairs: P, keys of a row, each asked once.
        num_rewritten: R, keys that are written twice.
        filler_length: tokens between the two writings.
        filler: what stands there and before the queries: "random" ids that the row's pairs do not use, or "zero".
    """

    vocab_size: Annotated[int, Range(minimum=4, maximum=2**22)]
    num_pairs: Count
    num_rewritten: Count
    filler_length: Annotated[int, Range(minimum=0)]
    filler: Literal["random", "zero"]

    def of_length(self, block_length: int) -> Self:
        """Return the probe in rows of another length: the two writings lie farther apart, the queries as near as they did."""
        filler_length = max(0, self.filler_length + block_length - self.block_length)
        return dataclasses.replace(self, block_length=block_length, filler_length=filler_length)

    def check(self, config: "TrainConfig") -> list[str]:
        """All writings, the filler and the queries fit into a row; keys and values of a row are all different."""
        problems = []
        needed = 3 * self.num_pairs + 2 * self.num_rewritten + self.filler_length
        if needed > self.block_length:
            problems.append(
                f"data.block_length={self.block_length}: is too short for data.num_pairs={self.num_pairs}, "
                f"data.num_rewritten={self.num_rewritten} and data.filler_length={self.filler_length}. "
                f"Allowed: at least {needed}. Raise it or lower one of these."
            )
        if self.num_rewritten > self.num_pairs:
            problems.append(
                f"data.num_rewritten={self.num_rewritten}: is more than data.num_pairs={self.num_pairs}. "
                f"Allowed: 1 to {self.num_pairs}. Lower data.num_rewritten or raise data.num_pairs."
            )
        values = self.num_pairs + self.num_rewritten
        if values > self.vocab_size // 2 - 1:
            problems.append(
                f"data.vocab_size={self.vocab_size}: is too small for rows of {values} different values. "
                f"Allowed: at least {2 * values + 2}. Raise it or lower data.num_pairs."
            )
        return problems


def draw_rows(data: OverwriteConfig) -> Rows:
    """Return the rows of a configuration, sliced by how often a key was written and by the tokens since it last was.

    `outdated` are the values written first to keys that are written twice.
    """
    generator = np.random.default_rng(data.generator_seed)
    rows, pairs, rewritten, half = data.num_samples, data.num_pairs, data.num_rewritten, data.vocab_size // 2
    keys = distinct(generator, rows, range(1, half), pairs)
    values = distinct(generator, rows, range(half, data.vocab_size), pairs + rewritten)
    # Keys come in random order: to rewrite the first R of them and to write all in another order is a random choice.
    order = distinct(generator, rows, range(pairs), pairs)
    first = _interleaved(np.take_along_axis(keys, order, 1), np.take_along_axis(values[:, :pairs], order, 1))
    second = _interleaved(keys[:, :rewritten], values[:, pairs:])
    rest = data.block_length - data.filler_length - first.shape[1] - second.shape[1] - pairs
    taken = np.concatenate([keys, values], axis=1)
    filler = filler_ids(data.filler, generator, taken, data.filler_length + rest, data.vocab_size)
    asked = distinct(generator, rows, range(pairs), pairs)
    before, after = np.split(filler, [data.filler_length], axis=1)
    inputs = np.concatenate([first, before, second, after, np.take_along_axis(keys, asked, 1)], axis=1)
    written = 2 * np.argsort(order, axis=1) + 1  # position of each key's value
    written[:, :rewritten] = first.shape[1] + data.filler_length + 2 * np.arange(rewritten) + 1
    last = np.concatenate([values[:, pairs:], values[:, rewritten:pairs]], axis=1)
    positions = np.broadcast_to(np.arange(data.block_length - pairs, data.block_length), asked.shape)
    axes = [
        Axis("written", ["once", "twice"], (asked < rewritten).astype(np.int64)),
        doubling("gap_tokens", positions - np.take_along_axis(written, asked, 1)),
    ]
    drawn = place_targets(inputs, positions, np.take_along_axis(last, asked, 1), axes)
    first_values = np.where(asked < rewritten, np.take_along_axis(values[:, :pairs], asked, 1), NO_TARGET)
    outdated = np.full(inputs.shape, NO_TARGET, dtype=np.int32)
    np.put_along_axis(outdated, positions, first_values, axis=1)
    return dataclasses.replace(drawn, outdated=outdated)


def _interleaved(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Key, value, key, value ...: [N, P] twice -> [N, 2 * P]."""
    return np.stack([keys, values], axis=2).reshape(len(keys), -1)


def prepare(data: OverwriteConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the generated rows; the tokenizer configuration plays no part."""
    return prepare_rows(
        data,
        draw_rows(data),
        num_samples=data.num_samples,
        vocab_size=data.vocab_size,
        num_answers=data.vocab_size - data.vocab_size // 2,
        source=f"overwrite, {data.num_rewritten} of {data.num_pairs} keys, seed {data.generator_seed}",
    )
