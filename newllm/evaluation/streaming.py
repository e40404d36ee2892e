"""Texts read in lanes three times at once: with their own memory, with none, with another text's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from newllm.data.lanes import lanes_beside
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import Score, score_of, score_states, token_losses
from newllm.layers.memory_layer import MemoryLayer
from newllm.layers.memory_state import MemoryLayerState
from newllm.models.base import LanguageModel
from newllm.state import map_parts, merge_rows, parts_of
from newllm.streaming import Batch, begin, read_block

Mode = Literal["exact", "memory_off", "other_memory"]
MODES: tuple[Mode, ...] = ("exact", "memory_off", "other_memory")


@dataclass(frozen=True)
class Readings:
    """What a batch of lanes came to.

    Attributes:
        hidden: states [B, T, D] of each reading; `other_memory` is missing with one lane.
        rows_of_other: rows in which `other_memory` read what another text had written. Before anything was, it is
            `memory_off` there, and no figure of another text's memory.
    """

    hidden: dict[Mode, Tensor]
    rows_of_other: list[int]


class StreamReading:
    """A model on its way through the batches of lanes.

    The readings differ in the memory alone: attention inside the open segment, what windows reach and what is fed back are each
    reading's own. `exact` is the deployed function: memories are written and read. In `memory_off` they stay empty. In
    `other_memory` each block reads the memory that the text in the lane beside it (`lanes_beside`) had just before, and nothing of
    its own is written; it takes two lanes, and something that the other has written.

    Args:
        model: any language model; one without memory layers has the reading `exact` only.
        context_tokens: tokens before a block that attention without a window still reaches.
        modes: readings wanted.
    """

    def __init__(self, model: LanguageModel, *, context_tokens: int, modes: Sequence[Mode] = MODES) -> None:
        has_memory = any(isinstance(layer, MemoryLayer) for layer in model.modules())
        self.model, self.context_tokens = model, context_tokens
        self.modes = [mode for mode in modes if mode == "exact" or has_memory]
        self._states: dict[str, Any] = {}
        self._lanes: Any = None  # after the last block of every lane, those that have ended included

    @torch.inference_mode()
    def read(self, batch: Batch) -> Readings:
        """Return what the readings of the next batch come to."""
        found: dict[Mode, Tensor] = {}
        rows_of_other: list[int] = []
        before, num_rows = self._lanes, len(batch["input_ids"])
        for mode in self.modes:
            state = begin(self.model, self._states.get(mode), batch)
            if mode == "other_memory":
                num_lanes = num_rows if before is None else before.num_rows
                if num_lanes == 1:
                    continue
                if before is not None:
                    others = before.select(lanes_beside(num_lanes)[:num_rows])
                    state, rows_of_other = with_memory(state, others), _written_rows(others)
            output = read_block(
                self.model,
                state,
                batch["input_ids"],
                context_tokens=self.context_tokens,
                update_memory=mode == "exact",
            )
            found[mode], self._states[mode] = output.hidden, output.state
        self._keep(self._states.get("exact"))
        return Readings(found, rows_of_other)

    def score(self, batch: Batch, token_bytes: Tensor | None) -> dict[str, Score]:
        """Return the scores of the next batch.

        Args:
            batch: `input_ids`, `labels`, `starts_text` [B, T].
            token_bytes: UTF-8 bytes of every token [V]; None where targets are not text.
        Returns:
            `exact` and `memory_off` of all targets; `other_memory` of those for which another text's memory was read, and
            `own_memory`, the exact reading of the same targets. Both are missing where there are none.
        """
        readings, labels = self.read(batch), batch["labels"]
        losses = {mode: token_losses(self.model, hidden, labels) for mode, hidden in readings.hidden.items()}
        found: dict[str, Score] = {
            mode: score_of(*pair, labels, token_bytes) for mode, pair in losses.items() if mode != "other_memory"
        }
        rows = readings.rows_of_other
        if rows:
            pairs = {"own_memory": losses["exact"], "other_memory": losses["other_memory"]}
            found |= {
                name: score_of(nats[rows], correct[rows], labels[rows], token_bytes)
                for name, (nats, correct) in pairs.items()
            }
        return found

    def _keep(self, state: Any) -> None:
        if len(self.modes) == 1:
            return
        if self._lanes is None or self._lanes.num_rows == state.num_rows:
            self._lanes = state
            return
        ended = list(range(state.num_rows, self._lanes.num_rows))
        self._lanes = merge_rows([(range(state.num_rows), state), (ended, self._lanes.select(ended))])


def with_memory(state: Any, other: Any) -> Any:
    """Return the state, what its memories hold replaced by what the other's do."""
    others = parts_of(other, MemoryLayerState)

    def replace(name: str, part: MemoryLayerState) -> MemoryLayerState:
        return dataclasses.replace(part, memory=others[name].memory)

    return map_parts(state, MemoryLayerState, replace)


def _written_rows(state: Any) -> list[int]:
    """The rows in which a memory holds something."""
    is_written = [~part.memory.is_empty().all(dim=1) for part in parts_of(state, MemoryLayerState).values()]
    return torch.stack(is_written).any(dim=0).nonzero().flatten().tolist()


def stream_states(material: Material) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch of a run's lanes with the hidden states [B, T, D] of the deployed function, as its validation made them."""
    context_tokens = getattr(material.run.config.trainer, "context_tokens", 0)
    reading = StreamReading(material.model, context_tokens=context_tokens, modes=["exact"])
    for batch in material.batches():
        yield batch, reading.read(batch).hidden["exact"]


def stream_scores(material: Material) -> Iterator[Score]:
    """Yield the score of the deployed function on each batch of a run's lanes."""
    for batch, hidden in stream_states(material):
        yield score_states(material.model, hidden, batch["labels"], material.data.token_bytes)
