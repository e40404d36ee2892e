"""State tracking: elements of a group, and at every position the product of all so far. No memory of pairs can solve it.

N: rows. G: elements of the group.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from newllm.config.schema import DataConfig, TokenizerConfig
from newllm.data.prepared import PreparedData
from newllm.data.recall import ProbeConfig, Rows, doubling, place_targets, prepare_rows

OBJECTS = {"parity": 2, "s3": 3}  # whose permutations the group is


@dataclass(frozen=True, kw_only=True)
class StateTrackingConfig(ProbeConfig, DataConfig):
    """Random elements; ids are elements, 0 does nothing.

    Attributes:
        group: "parity": 1 swaps two objects, so the product is the parity of the ones. "s3": all six permutations of three.
    """

    group: Literal["parity", "s3"]


def product_table(group: str) -> np.ndarray:
    """Return the element [G, G] that does first the one (row), then the other (column)."""
    elements = list(itertools.permutations(range(OBJECTS[group])))
    numbers = {element: number for number, element in enumerate(elements)}
    return np.array([[numbers[tuple(second[i] for i in first)] for second in elements] for first in elements])


def draw_rows(data: StateTrackingConfig) -> Rows:
    """Return the rows of a configuration, sliced by position."""
    table = product_table(data.group)
    generator = np.random.default_rng(data.generator_seed)
    inputs = generator.integers(len(table), size=(data.num_samples, data.block_length), dtype=np.int32)
    products = inputs.copy()
    for position in range(1, data.block_length):
        products[:, position] = table[products[:, position - 1], inputs[:, position]]
    positions = np.broadcast_to(np.arange(data.block_length), inputs.shape)
    return place_targets(inputs, positions, products, [doubling("position", positions)])


def prepare(data: StateTrackingConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Return the generated rows; the tokenizer configuration plays no part."""
    num_elements = len(product_table(data.group))
    return prepare_rows(
        data,
        draw_rows(data),
        num_samples=data.num_samples,
        vocab_size=num_elements,
        num_answers=num_elements,
        source=f"{data.group}, seed {data.generator_seed}",
    )
