"""CVFP phase 1: parallel sweeps against the token-online procedure it replaced and against exact passes; length, memory, agreement.

N: positions. C: context size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.measure import DEVICE, Found, paired_ratio, peak_bytes, require_quiet, table, take_turns, timed
from newllm.config.compose import compose
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.data.blocks import Blocks
from newllm.data.module import build_data
from newllm.data.positions import Positions
from newllm.embedding import embedding_table, set_embedding
from newllm.evaluation.context_statistics import agreement
from newllm.losses.diversity import DiversityConfig, DiversityLoss
from newllm.losses.fixed_point import fixed_point_loss
from newllm.models.context import ContextLM
from newllm.models.create import build_model
from newllm.recurrence import sweep
from newllm.trainers.context_cache import ContextCache
from newllm.trainers.context_stream import (
    MOST_SWEEPS,
    context_map,
    fill_layers,
    layer_contexts,
    only_trains,
    read_tokens,
    settle,
    slices,
    unroll_stream,
)

TOKENS = 10_000
WIDTHS = (128, 768)  # of contexts and tokens
LENGTHS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SLICE_TOKENS = 5000
NOISE, LR, CLIP, DIVERSITY_WEIGHT, EMA_KEPT = 0.1, 2e-3, 2.0, 0.9, 0.99
TRAINED_ITERATIONS = 60  # before parallel and exact contexts are compared; as many as phase 1 makes at most
CLEAN_SWEEPS = (1, 10, 100)
TOLERANCE = 1e-4


@dataclass
class Setting:
    """A context model over a text, with contexts kept for every position of it."""

    model: ContextLM
    positions: Positions
    device: torch.device
    cache: ContextCache = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.cache = ContextCache.empty(len(self.positions), self.model.context_dim)
        self.cache.contexts.copy_(0.01 * torch.randn(self.cache.contexts.shape))
        self.optimizer = torch.optim.Adam(self.model.context_block.parameters(), lr=LR)
        self.diversity = DiversityLoss(DiversityConfig(kind="diversity", name="odcm", weight=DIVERSITY_WEIGHT))

    @property
    def zeros(self) -> Tensor:
        """What stands before the first position [1, C]."""
        return torch.zeros(1, self.model.context_dim, device=self.device)

    def loss(self, new: Tensor, old: Tensor) -> Tensor:
        """What a slice adds to the loss of phase 1, by its share of the positions; contexts [1, n, C]."""
        loss = (1 - DIVERSITY_WEIGHT) * fixed_point_loss(new, old) + DIVERSITY_WEIGHT * self.diversity(new[0])
        return loss * (new.shape[1] / len(self.positions))

    def step(self) -> None:
        """Clip and make one optimizer step."""
        torch.nn.utils.clip_grad_norm_(self.model.context_block.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def setting(width: int, num_tokens: int, *, num_layers: int = 1) -> Setting:
    """Return an untrained context model over the first tokens of the default text, repeated where it is too short."""
    overrides = ["model=context", "trainer=cvfp_phase1", "tokenizer.vocab_size=1024", f"model.dim={width}"]
    config = cast(
        TrainConfig, real_config(compose([*overrides, f"model.context_dim={width}", f"model.num_layers={num_layers}"]))
    )
    data = build_data(config)
    data.prepare()
    blocks = data.prepared.train
    assert isinstance(blocks, Blocks), "the default source is text"
    torch.manual_seed(0)
    model = build_model(config, data.vocab_size)
    set_embedding(model, embedding_table(config.embedding, data, width))
    assert isinstance(model, ContextLM), "model=context"
    only_trains(model, "context_block")
    stream = np.resize(blocks.stream, num_tokens + 1)
    cut = Blocks(stream, block_length=num_tokens, num_blocks=1, eos_id=blocks.eos_id)
    return Setting(model.to(DEVICE), Positions(cut, num_input_tokens=1, reset_at_text=True), torch.device(DEVICE))


def parallel_iteration(on: Setting) -> None:
    """One iteration as trainer=cvfp_phase1 makes it: a sweep in slices, their gradients, one step."""
    before = on.zeros
    for batch in slices(on.positions, SLICE_TOKENS, device=on.device):
        old = on.cache.read(batch["position"], like=before)
        new = sweep(context_map(on.model, batch, noise=NOISE), old, before)
        on.loss(new, old).backward()
        before = old[:, -1]
        on.cache.write(batch["position"], new)
    on.step()


def exact_iteration(on: Setting) -> None:
    """The same single step from an exact pass: contexts one position after another, then their gradient through one application.

    The gradient is made for a slice at once, which is the fastest way to it: only the pass itself is sequential.
    """
    exact = ContextCache.empty(len(on.positions), on.model.context_dim)
    unroll_stream(on.model, on.positions, exact, slice_tokens=SLICE_TOKENS)
    before = on.zeros
    for batch in slices(on.positions, SLICE_TOKENS, device=on.device):
        old, exact_contexts = (cache.read(batch["position"], like=before) for cache in (on.cache, exact))
        new = sweep(context_map(on.model, batch), exact_contexts, before)
        on.loss(new, old).backward()
        before = exact_contexts[:, -1]
        on.cache.write(batch["position"], new)
    on.step()


def online_iteration(on: Setting) -> None:
    """The historical procedure: for each token forward, loss, backward and an Adam step; the context is carried on without gradient.

    A single context has no spread: diversity is its distance from a running mean.
    """
    context, mean = on.zeros.unsqueeze(1), on.zeros
    for batch in slices(on.positions, SLICE_TOKENS, device=on.device):
        tokens, old = read_tokens(on.model, batch), on.cache.read(batch["position"], like=context)
        for place in range(tokens.shape[1]):
            here = {"is_reset": batch["is_reset"][:, place : place + 1]}
            new = layer_contexts(on.model, here, tokens[:, place : place + 1], context.detach())[-1]
            movement = fixed_point_loss(new, old[:, place : place + 1])
            distance = -torch.linalg.vector_norm(new[0] - mean)
            ((1 - DIVERSITY_WEIGHT) * movement + DIVERSITY_WEIGHT * distance).backward()
            on.step()
            context = new.detach()
            mean = EMA_KEPT * mean + (1 - EMA_KEPT) * context[0]
            old[:, place] = context[:, 0]
        on.cache.write(batch["position"], old)


def speeds(width: int, num_tokens: int, *, rounds: int, is_quick: bool) -> dict[str, Any]:
    """Seconds per iteration over a text, each alternative on its own model, and their ratios round by round."""
    alternatives: dict[str, Callable[[], object]] = {}
    for name, run_once in PROCEDURES.items():
        own = setting(width, num_tokens)
        alternatives[name] = lambda run_once=run_once, own=own: run_once(own)  # type: ignore[misc]  # bound now
    parallel, exact, online = rows = take_turns(alternatives, rounds=rounds, warmups=1)
    if not is_quick:
        require_quiet(rows, f"cvfp_phase1, C {width}")
    return {
        **{row.name: row.figures() | {"median_seconds": row.median} for row in rows},
        "online_over_parallel": paired_ratio(online, parallel),
        "exact_over_parallel": paired_ratio(exact, parallel),
    }


@torch.no_grad()
def clean_sweep(on: Setting) -> None:
    """One sweep over all positions, without noise and gradients."""
    before = on.zeros
    for batch in slices(on.positions, SLICE_TOKENS, device=on.device):
        old = on.cache.read(batch["position"], like=before)
        on.cache.write(batch["position"], sweep(context_map(on.model, batch), old, before))
        before = old[:, -1]


def agreement_after_training(width: int, num_tokens: int) -> dict[str, Any]:
    """Parallel against exact contexts under trained weights: by clean sweeps from what training left, and as phase 1 hands them over.

    Slices that do not settle within the most sweeps are computed exactly: how many positions that concerned stands beside it.
    """
    on = setting(width, num_tokens)
    for _ in range(TRAINED_ITERATIONS):
        parallel_iteration(on)
    exact = ContextCache.empty(len(on.positions), width)
    unroll_stream(on.model, on.positions, exact, slice_tokens=SLICE_TOKENS)
    found, made = {}, 0
    for sweeps in CLEAN_SWEEPS:
        for _ in range(sweeps - made):
            clean_sweep(on)
        made = sweeps
        found[f"{sweeps}_sweeps"] = agreement(on.cache.contexts, exact.contexts)
    settled = settle(on.model, on.positions, on.cache, slice_tokens=SLICE_TOKENS, tolerance=TOLERANCE)
    found["handed_over"] = {**asdict(settled), **agreement(on.cache.contexts, exact.contexts)}
    return found


def length_and_memory(num_tokens: int) -> dict[str, float]:
    """Seconds of an iteration, and the most bytes of tensors that it holds together with the contexts."""
    on = setting(WIDTHS[0], num_tokens)
    parallel_iteration(on)
    seconds = timed(lambda: parallel_iteration(on))
    return {
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "cache_bytes": on.cache.nbytes,
        "slice_bytes": peak_bytes(lambda: parallel_iteration(on)),
        "scores_of_all_tokens_bytes": num_tokens * on.model.vocab_size * 4,
    }


def cache_speed(width: int, num_tokens: int, *, num_layers: int) -> dict[str, float]:
    """Bytes per second at which phase 2's contexts of all layers are made in parallel from those of the last."""
    on = setting(width, num_tokens, num_layers=num_layers)
    kept = ContextCache.empty(num_tokens, num_layers * width)
    kept.last(width).contexts.copy_(on.cache.contexts)
    (row,) = take_turns(
        {"build": lambda: fill_layers(on.model, on.positions, kept, slice_tokens=SLICE_TOKENS)}, rounds=3, warmups=1
    )
    return {"bytes": kept.nbytes, "gigabytes_per_second": kept.nbytes / row.median / 1e9, **row.figures()}


PROCEDURES = {"parallel": parallel_iteration, "exact pass": exact_iteration, "token-online": online_iteration}


def run(quick: bool) -> Found:
    """Measure speed and agreement at two widths, length and memory, and how fast phase 2's contexts are made."""
    num_tokens = 500 if quick else TOKENS
    widths = WIDTHS[:1] if quick else WIDTHS
    figures: dict[str, Any] = {}
    speed_lines, agreement_lines, length_lines, cache_lines = [], [], [], []
    for width in widths:
        speed = speeds(width, num_tokens, rounds=2 if quick else 3, is_quick=quick)
        close = agreement_after_training(width, num_tokens)
        seconds = [f"{speed[name]['median_seconds']:.3g} s" for name in PROCEDURES]
        ratios = [f"{speed[name]:.1f}" for name in ("online_over_parallel", "exact_over_parallel")]
        speed_lines.append([width, *seconds, *ratios])
        cosines = [f"{found['cosine_mean']:.4f}, {found['cosine_least']:.4f}" for found in close.values()]
        agreement_lines.append([width, *cosines, f"{close['handed_over']['exact_positions']:,}/{num_tokens:,}"])
        print(*speed_lines[-1], *agreement_lines[-1], sep=" | ", flush=True)
        figures[f"C{width}"] = {**speed, "parallel_against_exact": close}
    for length in LENGTHS[:2] if quick else LENGTHS:
        row = length_and_memory(length)
        names = ("cache_bytes", "slice_bytes", "scores_of_all_tokens_bytes")
        megabytes = [f"{row[name] / 1e6:,.1f} MB" for name in names]
        speed_told = [f"{row['seconds']:.3g} s", f"{row['tokens_per_second']:,.0f}"]
        length_lines.append([f"{length:,}", *speed_told, *megabytes])
        print(*length_lines[-1], sep=" | ", flush=True)
        figures[f"N{length}"] = row
    for width in widths:
        for layers in (1, 6):
            row = cache_speed(width, num_tokens, num_layers=layers)
            cache_lines.append(
                [width, layers, f"{row['bytes'] / 1e6:,.0f} MB", f"{row['gigabytes_per_second']:.2f} GB/s"]
            )
            print(*cache_lines[-1], sep=" | ", flush=True)
            figures[f"cache_C{width}_L{layers}"] = row
    return Found(_told(num_tokens, speed_lines, agreement_lines, length_lines, cache_lines), figures)


def _told(num_tokens: int, *lines: list[list[Any]]) -> str:
    speed, close, lengths, caches = lines
    heads = (
        ["C", *PROCEDURES, "online / parallel", "exact / parallel"],
        ["C", *(f"sweeps: {sweeps}" for sweeps in CLEAN_SWEEPS), "handed over", "of these computed exactly"],
        ["tokens", "iteration", "tokens/s", "cache", "beside it, at most", "scores of all tokens would take"],
        ["C", "layers", "contexts", "made at"],
    )
    return "\n\n".join(
        [
            f"One iteration over {num_tokens:,} tokens of the default text, one layer: all gradients and one optimizer step, except "
            "token-online, the historical procedure, which makes a step for every token.",
            table(heads[0], speed),
            f"Parallel contexts against exact ones under the weights of {TRAINED_ITERATIONS} iterations: cosine, mean and least over "
            f"positions, after clean sweeps over all positions at once, and as phase 1 hands them over: slices of {SLICE_TOKENS:,} one "
            f"after the other, swept until they stand still or, after {MOST_SWEEPS} sweeps, computed exactly.",
            table(heads[1], close),
            f"Longer texts, C {WIDTHS[0]}, slices of {SLICE_TOKENS:,} positions.",
            table(heads[2], lengths),
            "Contexts of all layers for phase 2, made in parallel.",
            table(heads[3], caches),
        ]
    )
