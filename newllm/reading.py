"""Reading texts of any length in constant memory: piece by piece of text, pass by pass of tokens, a bounded context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from newllm.layers.pythia import PythiaLayer, PythiaState
from newllm.models.base import LanguageModel, ModelOutput
from newllm.state import map_parts

# Text is tokenised in pieces of so many characters: the ids of a whole book at once would be the largest thing in memory.
PIECE_CHARACTERS = 1 << 14


def layer_of(model: LanguageModel, name: str) -> nn.Module:
    """Return the layer of a part of the model's state, by the part's dotted name."""
    # Stacks keep the state of layer i as `layers.i`, below whatever repeats the stack.
    return model.get_submodule(".".join(name.split(".")[-2:]))


def forget(model: LanguageModel, state: Any, kept_tokens: int) -> Any:
    """Return the state of which ordinary attention reaches the last tokens only; a window of its own already bounds what a layer keeps."""

    def shorten(name: str, cache: PythiaState) -> PythiaState:
        layer = layer_of(model, name)
        return cache.last(kept_tokens) if isinstance(layer, PythiaLayer) and layer.window is None else cache

    return map_parts(state, PythiaState, shorten)


def text_pieces(text: str) -> Iterator[str]:
    """Cut a text where tokenizers cut it anyway: before a space between two letters or digits.

    A text without such places, for instance Japanese, is cut at a new line, or anywhere.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = _cut(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _cut(text: str, first: int, last: int) -> int:
    for place in range(last - 1, first, -1):
        if text[place] == " " and text[place - 1].isalnum() and text[place + 1].isalnum():
            return place
    new_line = text.rfind("\n", first, last)
    return last if new_line < 0 else new_line


class BoundedReader:
    """A model whose ordinary attention forgets: it keeps the last C/2 tokens at every multiple of C/2, so C at most.

    Positions decide what is forgotten, never the calls: any cutting of a text gives the same state.

    Args:
        model: the model that reads.
        context_tokens: tokens that ordinary attention reaches at most (C).
        chunk_tokens: most tokens of one pass.
    """

    def __init__(self, model: LanguageModel, context_tokens: int, *, chunk_tokens: int | None = None) -> None:
        self.model, self.kept, self.chunk_tokens = model, context_tokens // 2, chunk_tokens
        self._grows = any(isinstance(layer, PythiaLayer) and layer.window is None for layer in model.modules())

    def exact(self, input_ids: Tensor, state: Any) -> ModelOutput:
        """Return the state after the tokens, and the hidden state of the last of them [1, 1, D].

        Args:
            input_ids: tokens [1, T].
            state: before the first of them.
        """
        start, output = 0, None
        while start < input_ids.shape[1]:
            stop = self._next_stop(start, input_ids.shape[1], state)
            output = self.model.exact(input_ids[:, start:stop], state)
            state = self._forget(output.state)
            start = stop
        assert output is not None, "a reader was given no token"
        return ModelOutput(None, output.hidden[:, -1:], state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores of the next token [..., V] for states [..., D]."""
        return self.model.logits(hidden)

    def _next_stop(self, start: int, end: int, state: Any) -> int:
        if self.chunk_tokens is not None:
            end = min(end, start + self.chunk_tokens)
        return min(end, start + self.kept - state.positions[0] % self.kept) if self._grows else end

    def _forget(self, state: Any) -> Any:
        if not self._grows or state.positions[0] % self.kept:
            return state
        return forget(self.model, state, self.kept)
