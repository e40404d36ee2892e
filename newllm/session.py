"""MemorySession: a model that reads texts of any length in constant memory, and whose memory can be saved, moved and asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.data.tokenizer import Tokenizer
from newllm.generation import SamplingOptions, generate
from newllm.layers.memory import LinearMemory, merge
from newllm.layers.memory_state import MemoryLayerState
from newllm.memory_file import (
    check_banks,
    fingerprint,
    load_banks,
    load_memory,
    memory_layer,
    save_banks,
    save_memory,
)
from newllm.models.base import LanguageModel
from newllm.reading import BoundedReader, text_pieces
from newllm.state import map_parts, parts_of


class MemorySession:
    """One reader: a model and the state of what it has read.

    Memories remember everything read, as far as they can; ordinary attention reaches the last `context_tokens`. The state is a
    value: whoever keeps `session.state` keeps that moment.

    Args:
        model: any language model; memory layers make it remember. It is used as it is: put it into evaluation mode first.
        tokenizer: the model's own.
        context_tokens: tokens that ordinary attention reaches at most, even; the block length of the training is what it knows.
        chunk_tokens: most tokens of one pass; they decide speed and memory, not the result.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, context_tokens: int = 128, chunk_tokens: int = 512
    ) -> None:
        if context_tokens < 2 or context_tokens % 2:
            raise ValueError(
                f"context_tokens={context_tokens}: is not an even number of tokens. Allowed: 2, 4, 6 and so on. "
                "Take the block length of the model's training."
            )
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens}: reads nothing. Allowed: 1 or more. Raise it.")
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"tokenizer: has {tokenizer.vocab_size} ids, the model {model.vocab_size}. Allowed: at most the model's. "
                "Use the tokenizer.json of the model's run."
            )
        self.model, self.tokenizer = model, tokenizer
        self.state: Any = model.initial_state(1)
        if not hasattr(self.state, "positions"):
            raise ValueError(
                f"model: {type(self.state).__name__} does not count what it has read. Allowed: states with `positions`, a tuple of the "
                "tokens of each text. Add them to the model's state."
            )
        self._reader = BoundedReader(model, context_tokens, chunk_tokens=chunk_tokens)

    @property
    def tokens_read(self) -> int:
        """Tokens behind the state, those of a loaded memory included; those of merged memories and loaded banks were read elsewhere."""
        return self.state.positions[0]

    @property
    def frozen(self) -> tuple[int, ...]:
        """Banks that are read and never written, in any layer."""
        return tuple(sorted({bank for part in self._parts().values() for bank, flag in enumerate(part.frozen) if flag}))

    def read(self, text: str) -> None:
        """Read a text on from where the last one stopped; an empty one changes nothing.

        No end of text is put after it: `read_ids([tokenizer.eos_id])` does that.
        """
        for piece in text_pieces(text):
            self.read_ids(self.tokenizer.encode(piece))

    @torch.no_grad()
    def read_ids(self, token_ids: Sequence[int]) -> None:
        """Read tokens on from where the last ones stopped.

        Raises:
            ValueError: an id that the model does not have.
        """
        self._check_ids(token_ids)
        if len(token_ids):
            self.state = self._reader.exact(self._tensor(token_ids), self.state).state

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        options: SamplingOptions | None = None,
        seed: int = 0,
        update_memory: bool = False,
    ) -> str:
        """Return how the model continues the prompt after all it has read.

        Args:
            prompt: text that follows what was read.
            max_new_tokens: most tokens to write; an end of text ends earlier.
            options: how tokens are drawn; None takes SamplingOptions().
            seed: of the draws; the same seed gives the same text.
            update_memory: False asks: the session stays as it was. True reads prompt and continuation into it. Either way the
                continuation sees all of the prompt, which goes to a memory of its own making.
        Raises:
            ValueError: an empty prompt.
        """
        prompt_ids = self.tokenizer.encode(prompt)
        written = generate(
            self._reader,
            self._tensor(prompt_ids),
            self.state,
            max_new_tokens=max_new_tokens,
            options=SamplingOptions() if options is None else options,
            eos_id=self.tokenizer.eos_id,
            seed=seed,
        )
        new_ids = written.token_ids[0].tolist()
        if update_memory:
            self.read_ids([*prompt_ids, *new_ids])
        return self.tokenizer.decode([token for token in new_ids if token != self.tokenizer.eos_id])

    def reset(self, *, keep_frozen: bool = True) -> None:
        """Forget everything but, unless told otherwise, what frozen banks hold."""
        fresh = self.model.initial_state(1)
        if keep_frozen:
            kept = self.state.reset([True])
            parts = parts_of(kept, MemoryLayerState)

            def keep(name: str, empty: MemoryLayerState) -> MemoryLayerState:
                return dataclasses.replace(empty, memory=parts[name].memory, frozen=parts[name].frozen)

            fresh = map_parts(fresh, MemoryLayerState, keep)
        self.state = fresh

    def freeze(self, banks: Sequence[int] | None = None) -> None:
        """Protect banks from writing in every memory layer; None protects all.

        Raises:
            ValueError: a bank that does not exist, or a model without memory.
        """
        self._set_frozen(banks, is_frozen=True)

    def unfreeze(self, banks: Sequence[int] | None = None) -> None:
        """Open banks to writing again; None opens all.

        Raises:
            ValueError: a bank that does not exist, or a model without memory.
        """
        self._set_frozen(banks, is_frozen=False)

    def save(self, path: str | Path) -> None:
        """Write the memory to a file, whole or not at all; folders on the way to it are made.

        Raises:
            ValueError: the model has no memory, it holds numbers that are not finite, or no file can be written there.
        """
        self._check_has_memory("save")
        save_memory(path, self.model, self.state)

    def export(self, banks: Sequence[int], path: str | Path) -> None:
        """Write some banks of every memory layer to a file, to be loaded into banks of other sessions.

        Raises:
            ValueError: a bank that does not exist, numbers that are not finite, or no file can be written there.
        """
        check_banks(banks, self.model, where="export")
        save_banks(path, self.model, self.state, banks)

    def load(self, path: str | Path, *, into: Sequence[int] | None = None) -> None:
        """Take up a memory from a file; if it is refused, nothing is changed.

        Args:
            path: file that `save` or `export` wrote.
            into: banks that receive the file's, in its order; the rest of the session stays. None replaces the whole memory and
                forgets what ordinary attention still reached.
        Raises:
            ValueError: the file is damaged, of another model or version, or does not fit `into`.
        """
        self._check_has_memory("load")
        if into is None:
            self.state = load_memory(path, self.model)
            return
        check_banks(into, self.model, where="into")
        self._check_open(into, "load")
        memories = dict(zip(self._parts(), load_banks(path, self.model), strict=True))
        for name, memory in memories.items():
            if memory.matrix.shape[1] != len(into):
                raise ValueError(
                    f"{path}: holds {memory.matrix.shape[1]} banks of {name}, into={list(into)} names {len(into)}. "
                    "Allowed: equal numbers. Name a bank for each."
                )

        def put(name: str, part: MemoryLayerState) -> MemoryLayerState:
            return dataclasses.replace(part, memory=_with_banks(part.memory, into, memories[name]))

        self.state = map_parts(self.state, MemoryLayerState, put)

    def merge(self, others: Sequence[MemorySession | str | Path]) -> None:
        """Add what others have read, as if this session had read it too; if it is refused, nothing is changed.

        Their open segments are written first, into frozen banks too. Exact in layers whose keys and values come from the tokens
        alone (the bottom layer of a stack without feedback): higher ones were written by readers that did not know the other texts.

        Args:
            others: sessions of the same model, or files that they saved.
        Raises:
            ValueError: memories of the delta rule, a frozen bank here, or another model.
        """
        self._check_has_memory("merge")
        self._check_open(range(max(len(part.frozen) for part in self._parts().values())), "merge")
        states = [self._state_of(other) for other in others]

        @torch.no_grad()
        def add(name: str, part: MemoryLayerState) -> MemoryLayerState:
            theirs = [parts_of(state, MemoryLayerState)[name] for state in states]
            layer = memory_layer(self.model, name)
            if part.memory.rule == "linear":
                theirs = [layer.close_segment(it.freeze(None, is_frozen=False)) for it in theirs]
            closed = [it.memory for it in theirs]
            return dataclasses.replace(part, memory=merge([part.memory, *closed]))

        self.state = map_parts(self.state, MemoryLayerState, add)

    def _parts(self) -> dict[str, MemoryLayerState]:
        return parts_of(self.state, MemoryLayerState)

    def _tensor(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], dtype=torch.int64, device=next(self.model.parameters()).device)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < self.model.vocab_size:
            raise ValueError(
                f"token_ids: hold {min(token_ids)} to {max(token_ids)}. Allowed: 0 to {self.model.vocab_size - 1}. "
                "Encode the text with the model's own tokenizer."
            )

    def _check_has_memory(self, where: str) -> None:
        if not self._parts():
            raise ValueError(
                f"{where}: the model has no memory layer. Allowed: stacks with one. Build it with model=infini."
            )

    def _check_open(self, banks: Sequence[int], where: str) -> None:
        closed = [bank for bank in self.frozen if bank in banks]
        if closed:
            raise ValueError(
                f"{where}: bank {closed[0]} is frozen. Allowed: banks open to writing. Call unfreeze([{closed[0]}]) first."
            )

    def _set_frozen(self, banks: Sequence[int] | None, *, is_frozen: bool) -> None:
        where = "freeze" if is_frozen else "unfreeze"
        self._check_has_memory(where)
        if banks is not None:
            check_banks(banks, self.model, where=where)
        chosen = None if banks is None else list(banks)
        self.state = map_parts(self.state, MemoryLayerState, lambda _, part: part.freeze(chosen, is_frozen=is_frozen))

    def _state_of(self, other: MemorySession | str | Path) -> Any:
        if not isinstance(other, MemorySession):
            return load_memory(other, self.model)
        ours, theirs = fingerprint(self.model), fingerprint(other.model)
        if ours != theirs:
            raise ValueError(
                f"merge: a session is of model {theirs}, this is model {ours}. "
                "Allowed: memories of the same weights and layers. Read the text with this model."
            )
        return other.state


def _with_banks(memory: LinearMemory, banks: Sequence[int], others: LinearMemory) -> LinearMemory:
    """Return the memory with the given banks replaced by the others, in their order."""
    found = memory.banks()
    for bank, other in zip(banks, others.banks(), strict=True):
        found[bank] = other
    return memory.with_banks(found)
