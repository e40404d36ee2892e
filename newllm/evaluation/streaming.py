"""Texts read in lanes three times at once: with their own memory, with none, with another text's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from newllm.evaluation.material import Material
from newllm.evaluation.scoring import Score, score_states
from newllm.layers.memory_layer import MemoryLayer
from newllm.layers.memory_state import MemoryLayerState
from newllm.models.base import LanguageModel
from newllm.state import map_parts, merge_rows, parts_of
from newllm.streaming import Batch, begin, read_block

Mode = Literal["exact", "memory_off", "other_memory"]
MODES: tuple[Mode, ...] = ("exact", "memory_off", "other_memory")


class StreamReading:
    """A model on its way through the batches of lanes.

    The readings differ in the memory alone: attention inside the open segment, what windows reach and what is fed back are each
    reading's own. `exact` is the deployed function: memories are written and read. In `memory_off` they stay empty. In
    `other_memory` each block reads the memory that the text in the next lane had just before, and nothing of its own is written;
    it takes two lanes.

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
    def read(self, batch: Batch) -> dict[Mode, Tensor]:
        """Return the hidden states [B, T, D] of each reading of the next batch; `other_memory` is missing with one lane."""
        found: dict[Mode, Tensor] = {}
        before, num_rows = self._lanes, len(batch["input_ids"])
        for mode in self.modes:
            state = begin(self.model, self._states.get(mode), batch)
            if mode == "other_memory":
                num_lanes = num_rows if before is None else before.num_rows
                if num_lanes == 1:
                    continue
                if before is not None:
                    state = _with_memory(state, before.select([(row + 1) % num_lanes for row in range(num_rows)]))
            output = read_block(
                self.model,
                state,
                batch["input_ids"],
                context_tokens=self.context_tokens,
                update_memory=mode == "exact",
            )
            found[mode], self._states[mode] = output.hidden, output.state
        self._keep(self._states.get("exact"))
        return found

    def score(self, batch: Batch, token_bytes: Tensor | None) -> dict[str, Score]:
        """Return the score of each reading of the next batch.

        Args:
            batch: `input_ids`, `labels`, `starts_text` [B, T].
            token_bytes: UTF-8 bytes of every token [V]; None where targets are not text.
        """
        labels = batch["labels"]
        return {
            mode: score_states(self.model, hidden, labels, token_bytes) for mode, hidden in self.read(batch).items()
        }

    def _keep(self, state: Any) -> None:
        if len(self.modes) == 1:
            return
        if self._lanes is None or self._lanes.num_rows == state.num_rows:
            self._lanes = state
            return
        ended = list(range(state.num_rows, self._lanes.num_rows))
        self._lanes = merge_rows([(range(state.num_rows), state), (ended, self._lanes.select(ended))])


def _with_memory(state: Any, other: Any) -> Any:
    """The state, what its memories hold replaced by what the other's do."""
    others = parts_of(other, MemoryLayerState)

    def replace(name: str, part: MemoryLayerState) -> MemoryLayerState:
        return dataclasses.replace(part, memory=others[name].memory)

    return map_parts(state, MemoryLayerState, replace)


def stream_states(material: Material) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch of a run's lanes with the hidden states [B, T, D] of the deployed function, as its validation made them."""
    context_tokens = getattr(material.run.config.trainer, "context_tokens", 0)
    reading = StreamReading(material.model, context_tokens=context_tokens, modes=["exact"])
    for batch in material.batches():
        yield batch, reading.read(batch)["exact"]


def stream_scores(material: Material) -> Iterator[Score]:
    """Yield the score of the deployed function on each batch of a run's lanes."""
    for batch, hidden in stream_states(material):
        yield score_states(material.model, hidden, batch["labels"], material.data.token_bytes)
