"""One optimizer step of a model of ours, as a bare loop makes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import DEVICE
from newllm.losses.next_token import NextTokenConfig, NextTokenLoss
from newllm.models.base import LanguageModel
from newllm.recurrence import Solver, unroll
from newllm.trainers.lag import trained_states
from newllm.trainers.lagged_cache import LaggedCache

CLIP = 1.0  # as conf/trainer has it
CACHED_BATCHES = 16  # of samples whose states are kept: more than a processor's own caches hold


def bare_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a call that makes one step: gradients, their norm clipped, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def parallel_loss(model: LanguageModel, inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return the loss of one parallel pass of a model without feedback."""
    loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
    return lambda: loss(model, model.encode(inputs, model.initial_state(len(inputs))).hidden, labels)


def exact_loss(model: LanguageModel, inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return the loss of the exact recurrence, position by position, as trainer=sequential computes it."""
    loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
    return lambda: loss(model, unroll(model, inputs, model.initial_state(len(inputs)))[0], labels)


def lagged_loss(
    model: LanguageModel, inputs: Tensor, labels: Tensor, *, sweeps: int, solver: Solver = "sweeps"
) -> Callable[[], Tensor]:
    """Return the loss of K sweeps or Newton steps from cached states, fetched before and put back after them, as trainer=lct does."""
    loss = NextTokenLoss(NextTokenConfig(kind="next_token"))
    batch_size, length = inputs.shape
    cache = LaggedCache(CACHED_BATCHES * batch_size, length, model.dim, dtype="bf16")
    batches = cycle(torch.randperm(CACHED_BATCHES * batch_size).split(batch_size))

    def call() -> Tensor:
        sample_ids = next(batches)
        start = cache.gather(sample_ids, device=inputs.device, dtype=torch.float32)
        states = trained_states(model, inputs, start, sweeps=sweeps, solver=solver)
        cache.scatter(sample_ids, states)
        return loss(model, states, labels)

    return call


def random_ids(batch_size: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return inputs and the tokens after them [B, T]: speed does not depend on what they are."""
    ids = torch.randint(vocab_size, (batch_size, length + 1), device=DEVICE)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def num_parameters(model: Any) -> str:
    """Return the parameters in millions, shared ones once."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
