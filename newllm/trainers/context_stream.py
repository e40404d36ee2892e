"""Contexts of a whole stream of text, made slice by slice from left to right: one sweep with a loss, sweeps to a tolerance, or exactly.

n: positions of a slice. C: context size. k: last tokens of a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from newllm.data.positions import Positions
from newllm.models.context import ContextLM
from newllm.recurrence import Map, shift, solve
from newllm.trainers.base import Batch
from newllm.trainers.context_cache import ContextCache

# Contexts that remember thousands of tokens need as many sweeps; one exact pass over a slice is then cheaper.
MOST_SWEEPS = 100


@dataclass(frozen=True)
class Settling:
    """How sweeps over a stream ended.

    Attributes:
        sweeps: made by the slice that needed most.
        exact_positions: positions of slices that had not settled after the most sweeps, and were computed one by one.
    """

    sweeps: int
    exact_positions: int


def read_tokens(model: ContextLM, batch: Batch) -> Tensor:
    """Return what enters every position: normed embeddings of its last k tokens [1, n, k*D], zeros for those of another text."""
    embedded = model.embedding_norm(model.embedding(batch["window_ids"]))
    return (embedded * batch["is_read"].unsqueeze(-1)).flatten(2)  # [1, n, k, D] -> [1, n, k*D]


def layer_contexts(
    model: ContextLM, batch: Batch, tokens: Tensor, previous: Tensor, *, noise: float = 0.0
) -> tuple[Tensor, ...]:
    """Return the contexts of all layers, each [1, n, C], from those of the positions before.

    Args:
        model: gives the context block.
        batch: a slice of positions.
        tokens: what enters them, [1, n, k*D].
        previous: last layer's context of the position before each [1, n, C]; not read where a text begins.
        noise: standard deviation of what is added to it, from torch's generator.
    """
    previous = previous.masked_fill(batch["is_reset"].unsqueeze(-1), 0.0)
    if noise > 0:
        previous = previous + noise * torch.randn_like(previous)
    return model.context_block(previous, tokens=tokens)


def context_map(model: ContextLM, batch: Batch, *, noise: float = 0.0) -> Map:
    """Return the map of a slice: previous contexts [1, n, C] -> contexts [1, n, C] of the last layer."""
    tokens = read_tokens(model, batch)
    return lambda previous: layer_contexts(model, batch, tokens, previous, noise=noise)[-1]


def slices(positions: Positions, slice_tokens: int, *, device: torch.device) -> Iterator[Batch]:
    """Yield the slices of a stream in order."""
    for start in range(0, len(positions), slice_tokens):
        batch = positions.__getitems__(range(start, min(start + slice_tokens, len(positions))))
        yield on_stream({name: part.to(device) for name, part in batch.items()}, positions.reset_at_text)


def on_stream(batch: Batch, reset_at_text: bool) -> Batch:
    """Return the batch with `is_reset` [1, n]: True where the context before is not read.

    Nothing is reset where the stream is one text: what stands before its first position is for the caller to say.
    """
    starts = batch["starts_text"]
    return batch | {"is_reset": starts if reset_at_text else torch.zeros_like(starts)}


@torch.no_grad()
def settle(
    model: ContextLM, positions: Positions, cache: ContextCache, *, slice_tokens: int, tolerance: float
) -> Settling:
    """Sweep a stream's contexts, in place, until no slice changes by more than the tolerance; without noise, from nothing at its start.

    Slices come one after the other, each from the settled end of the one before: no more than a slice is computed at once. A slice
    that does not settle in `MOST_SWEEPS` is computed exactly.

    Args:
        model: gives the context block.
        positions: of the stream.
        cache: its contexts, from which the sweeps start.
        slice_tokens: n.
        tolerance: relative change, unitless.
    """
    like, most, exact = next(model.context_block.parameters()), 0, 0
    before = like.new_zeros(1, model.context_dim)
    for batch in slices(positions, slice_tokens, device=like.device):
        start = cache.read(batch["position"], like=like)
        sweeps = min(MOST_SWEEPS, start.shape[1])
        found = solve(context_map(model, batch), start, sweeps=sweeps, tolerance=tolerance, first_BD=before)
        states = found.states
        if sweeps < start.shape[1] and found.residuals[-1] > tolerance:
            states = _exact(model, batch, before)
            exact += start.shape[1]
        cache.write(batch["position"], states)
        before, most = states[:, -1], max(most, found.sweeps)
    return Settling(most, exact)


@torch.no_grad()
def unroll_stream(model: ContextLM, positions: Positions, cache: ContextCache, *, slice_tokens: int) -> None:
    """Make a stream's contexts exactly, one position after another, into the cache: what `unroll` does to a text."""
    like = next(model.context_block.parameters())
    before = like.new_zeros(1, model.context_dim)
    for batch in slices(positions, slice_tokens, device=like.device):
        states = _exact(model, batch, before)
        cache.write(batch["position"], states)
        before = states[:, -1]


def _exact(model: ContextLM, batch: Batch, before: Tensor) -> Tensor:
    """The contexts of a slice [1, n, C], one position after another from the one before the first [1, C]."""
    tokens, previous, made = read_tokens(model, batch), before.unsqueeze(1), []
    for place in range(tokens.shape[1]):
        here = {"is_reset": batch["is_reset"][:, place : place + 1]}
        previous = layer_contexts(model, here, tokens[:, place : place + 1], previous)[-1]
        made.append(previous)
    return torch.cat(made, dim=1)


@torch.no_grad()
def fill_layers(model: ContextLM, positions: Positions, cache: ContextCache, *, slice_tokens: int) -> None:
    """Make the contexts of all layers, in place, from those of the last layer, which a cache of all layers holds already.

    One application of the context block to every position. The last layer's contexts stay as they were.

    Args:
        model: gives the context block.
        positions: of the stream.
        cache: contexts of all layers [N, L*C].
        slice_tokens: n.
    """
    like, width = next(model.context_block.parameters()), model.context_dim
    before = like.new_zeros(1, width)
    for batch in slices(positions, slice_tokens, device=like.device):
        last = cache.read(batch["position"], like=like)[..., -width:]
        contexts = layer_contexts(model, batch, read_tokens(model, batch), shift(last, before))
        cache.write(batch["position"], torch.cat([*contexts[:-1], last], dim=-1))
        before = last[:, -1]


def only_trains(model: nn.Module, *parts: str) -> None:
    """Leave every parameter out of training but those of the named parts of a model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in parts)
