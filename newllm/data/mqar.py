"""Multi-query associative recall: pairs of key and value, then the keys again; the target of a key is its value.

N: rows. P: pairs of a row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from newllm.config.fields import Count, Range
from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.prepared import PreparedData
from newllm.data.recall import ProbeConfig, Rows, distinct, doubling, filler_ids, place_targets, prepare_rows

if TYPE_CHECKING:
    from newllm.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class MqarConfig(ProbeConfig, DataConfig):
    """Pairs at the start of a row, their keys asked at every other position after them.

    Attributes:
        vocab_size: V; keys are 1 to V/2 - 1, values V/2 to V - 1.
        num_pairs: keys and values of a row, each asked once.
        gap_power: a, of the density a * gap^(a - 1) of the gaps between the pairs and a query; the smaller, the nearer.
        filler: what stands where nothing is written or asked: "random" ids that the row's pairs do not use, or "zero".
    """

    vocab_size: Annotated[int, Range(minimum=4, maximum=2**22)]
    num_pairs: Count
    gap_power: Annotated[float, Range(above=0)]
    filler: Literal["random", "zero"]

    def check(self, config: "TrainConfig") -> list[str]:
        """Every pair takes two positions, and its query the next two of the rest; every key is another one."""
        problems = []
        if 4 * self.num_pairs > self.block_length:
            problems.append(
                f"data.num_pairs={self.num_pairs}: does not fit into rows of data.block_length={self.block_length}, with four "
                f"positions a pair. Allowed: 1 to {self.block_length // 4}. Lower data.num_pairs or raise data.block_length."
            )
        if self.num_pairs > self.vocab_size // 2 - 1:
            problems.append(
                f"data.num_pairs={self.num_pairs}: is more than the {self.vocab_size // 2 - 1} keys of data.vocab_size="
                f"{self.vocab_size}. Allowed: at most half the vocabulary less one. Lower data.num_pairs or raise data.vocab_size."
            )
        return problems


def draw_gaps(generator: np.random.Generator, shape: tuple[int, int], places: int, power: float) -> np.ndarray:
    """Return different places [N, P] out of 0 to `places` - 1, drawn one after another with density power * gap^(power - 1).

    Args:
        generator: of the draw.
        shape: [N, P].
        places: how many there are, at least P.
        power: the exponent and factor a.
    """
    log_density = (power - 1) * np.log(np.arange(1, places + 1))
    # The largest of log density plus Gumbel noise are a draw without replacement, in its order.
    scores = log_density + generator.gumbel(size=(shape[0], places))
    return np.argsort(-scores, axis=1)[:, : shape[1]]


def draw_rows(data: MqarConfig) -> Rows:
    """Return the rows of a configuration, sliced by the tokens between a value and its query."""
    generator = np.random.default_rng(data.generator_seed)
    shape = (data.num_samples, data.num_pairs)
    half = data.vocab_size // 2
    keys = distinct(generator, data.num_samples, range(1, half), data.num_pairs)
    values = distinct(generator, data.num_samples, range(half, data.vocab_size), data.num_pairs)
    pairs = np.stack([keys, values], axis=2).reshape(data.num_samples, -1)  # [N, P, 2] -> [N, 2 * P]
    rest = data.block_length - pairs.shape[1]
    queries = pairs.shape[1] + 2 * draw_gaps(generator, shape, rest // 2, data.gap_power)
    filler = filler_ids(data.filler, generator, pairs, rest, data.vocab_size)
    inputs = np.concatenate([pairs, filler], axis=1)
    np.put_along_axis(inputs, queries, keys, axis=1)
    written = 2 * np.arange(data.num_pairs) + 1
    return place_targets(inputs, queries, values, [doubling("gap_tokens", queries - written)])


def prepare(data: MqarConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the generated rows; the tokenizer configuration plays no part."""
    return prepare_rows(
        data,
        draw_rows(data),
        num_samples=data.num_samples,
        vocab_size=data.vocab_size,
        num_answers=data.vocab_size - data.vocab_size // 2,
        source=f"mqar, {data.num_pairs} pairs, seed {data.generator_seed}",
    )
