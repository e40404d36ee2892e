"""Newton steps (DEER) beside sweeps and exact training: how many settle, what they cost, how near they come while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.steps import CLIP, bare_step, exact_loss, lagged_loss, random_ids
from newllm.config.compose import compose
from newllm.config.schema import TrainConfig
from newllm.config.typed import real_config
from newllm.data.module import build_data
from newllm.embedding import embedding_table, set_embedding, token_embedding
from newllm.models.create import build_model, create_model
from newllm.recurrence import Map, jacobians, relative_change, shift, solve, unroll
from newllm.trainers.base import Batch
from newllm.trainers.build import build_training_module
from newllm.trainers.lag import carried_map, flat_gradient, newton_to_tolerance, trained_states
from newllm.trainers.lct import LctModule

GAINS = (0.5, 0.9, 1.2, 1.5)
UNITS, LENGTH, TEXTS, SEEDS = 32, 512, 4, 5
NOISE = 0.1  # of the size of exact states: about what a cached state of a settled model is away
TOLERANCE = 1e-4
MOST_STEPS = 32
VOCABULARY = 4096
# Batch, length, and how wide what is fed back is.
SHAPES = [(8, 128, 32), (8, 128, 64), (8, 128, 128), (8, 512, 32), (8, 512, 64), (1, 512, 64)]
TRAINED = {
    "context": [
        *("model=context", "trainer=lct", "trainer.sweeps=1", "data.max_train_blocks=240", "data.max_unseen=0.2"),
        "data.max_validation_blocks=8",
    ],
    "delay_copy": ["experiment=delay_copy", "data.delay=2", "trainer.sweeps=3"],
}
PROBED_STEPS = (0, 30, 60, 120, 240, 480, 960)
PROBED_ROWS = 8


def tanh_map(gain: float, seed: int, length: int) -> Map:
    """Return h_t = tanh(W h_{t-1} + x_t), W ~ N(0, gain^2 / units), x ~ N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    weight = gain * UNITS**-0.5 * torch.randn(UNITS, UNITS, generator=generator)
    inputs = torch.randn(TEXTS, length, UNITS, generator=generator)
    weight, inputs = weight.to(DEVICE), inputs.to(DEVICE)
    return lambda previous: torch.tanh(previous @ weight.T + inputs)


def settling(gain: float, length: int) -> dict[str, list[int | None]]:
    """Return the sweeps and the Newton steps after which states no longer change, from zeros and from near, one entry a seed."""
    found: dict[str, list[int | None]] = {"sweeps": [], "newton": [], "sweeps_near": [], "newton_near": []}
    for seed in range(SEEDS):
        step = tanh_map(gain, seed, length)
        zeros = torch.zeros(TEXTS, length, UNITS, device=DEVICE)
        exact = solve(step, zeros, sweeps=length).states
        near = exact + NOISE * exact.square().mean().sqrt() * torch.randn_like(exact)
        for name, start in (("", zeros), ("_near", near)):
            found[f"sweeps{name}"].append(solve(step, start, sweeps=length, tolerance=TOLERANCE).sweeps)
            found[f"newton{name}"].append(newton_to_tolerance(step, start, most=MOST_STEPS, tolerance=TOLERANCE))
    return found


def costs(batch_size: int, length: int, width: int, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of one training step by each procedure, of every kind of model."""
    inputs, labels = random_ids(batch_size, length, VOCABULARY)
    layer: dict[str, Any] = {"window": 1, "dim": width, "num_layers": 1, "num_heads": 2, "mlp_dim": 4 * width}
    models = {
        "pythia, window 1": create_model("pythia", vocab_size=VOCABULARY, seed=0, feedback="additive", **layer),
        "context": create_model("context", vocab_size=VOCABULARY, seed=0, dim=width, context_dim=width),
    }
    for name, model in models.items():
        model.to(DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "sweep": bare_step(model, lagged_loss(model, inputs, labels, sweeps=1)),
            "newton": bare_step(model, lagged_loss(model, inputs, labels, sweeps=1, solver="newton")),
            "exact": bare_step(model, exact_loss(model, inputs, labels)),
        }
        yield name, {row.name: row for row in take_turns(calls, rounds=rounds)}


def while_training(overrides: Sequence[str], probed_steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Train by sweeps, and yield at each probed step how far sweep and Newton step from the cached states are from the exact ones."""
    config = cast(TrainConfig, real_config(compose(list(overrides))))
    data = build_data(config)
    data.prepare()
    torch.manual_seed(config.seed)
    model = build_model(config, data.vocab_size)
    if config.embedding.kind != "random":
        set_embedding(model, embedding_table(config.embedding, data, token_embedding(model).embedding_dim))
    model.to(DEVICE)
    with TemporaryDirectory() as folder:
        module = build_training_module(
            model, config, data.token_bytes, num_samples=data.num_train_samples, folder=Path(folder)
        )
        assert isinstance(module, LctModule)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
        for step, batch in enumerate(_batches(data, probed_steps[-1] + 1)):
            if step in probed_steps:
                yield {"step": step, **probed(module, {name: part[:PROBED_ROWS] for name, part in batch.items()})}
            optimizer.zero_grad()
            module.loss(model, module.states(batch), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()


def probed(module: LctModule, batch: Batch) -> dict[str, Any]:
    """Return relative errors of the cached states, after a sweep and after a Newton step, and cosines to the exact gradient."""
    model, input_ids, labels = module.model, batch["input_ids"], batch["labels"]
    lagged, width = module.lagged_states(batch), model.carried_dim
    exact, _ = unroll(model, input_ids, model.initial_state(len(input_ids)))
    swept = trained_states(model, input_ids, lagged, sweeps=1)
    stepped = trained_states(model, input_ids, lagged, sweeps=1, solver="newton")
    by_exact, by_swept, by_stepped = (
        flat_gradient(model, module.loss(model, states, labels)) for states in (exact, swept, stepped)
    )
    step, carried = carried_map(model, input_ids), exact[..., :width].detach()
    with torch.enable_grad():
        previous = shift(carried).requires_grad_()
        growth = torch.linalg.matrix_norm(jacobians(step(previous), previous)[:, 1:], 2)
    return {
        "lag": relative_change(carried, lagged[..., :width]),
        "after_sweep": relative_change(carried, swept[..., :width]),
        "after_newton": relative_change(carried, stepped[..., :width]),
        "cosine_sweep": nn.functional.cosine_similarity(by_swept, by_exact, dim=0).item(),
        "cosine_newton": nn.functional.cosine_similarity(by_stepped, by_exact, dim=0).item(),
        "newton_to_tolerance": newton_to_tolerance(step, lagged[..., :width], most=MOST_STEPS, tolerance=TOLERANCE),
        "growth": growth.mean().item(),
    }


def run(quick: bool) -> Found:
    """Measure settling on tanh networks, training steps of pointwise models, and Newton steps from what training caches."""
    figures: dict[str, Any] = {}
    counts: list[list[object]] = []
    for gain in GAINS[:1] if quick else GAINS:
        figures[f"gain_{gain}"] = settled = settling(gain, 16 if quick else LENGTH)
        counts.append([gain, *(_spread(numbers) for numbers in settled.values())])
        print(*counts[-1], sep=" | ", flush=True)
    lines: list[list[object]] = []
    for batch_size, length, width in [(2, 16, 8)] if quick else SHAPES:
        for name, rows in costs(batch_size, length, width, 2 if quick else 5):
            if not quick:
                require_quiet(list(rows.values()), f"newton, {name}, B {batch_size}, T {length}, C {width}")
            over_sweep, over_exact = (paired_ratio(rows["newton"], rows[other]) for other in ("sweep", "exact"))
            durations = [f"{1000 * row.median:.1f} ms" for row in rows.values()]
            lines.append([name, batch_size, length, width, *durations, f"{over_sweep:.1f}", f"{over_exact:.2f}"])
            print(*lines[-1], sep=" | ", flush=True)
            figures[f"{name}_B{batch_size}_T{length}_C{width}"] = {n: row.figures() for n, row in rows.items()} | {
                "newton_over_sweep": over_sweep,
                "newton_over_exact": over_exact,
            }
    probes: list[list[object]] = []
    for name, overrides in TRAINED.items():
        for found in while_training(overrides, PROBED_STEPS[:2] if quick else PROBED_STEPS):
            step, settle = found["step"], found["newton_to_tolerance"]
            distances = [f"{found[key]:.2g}" for key in ("lag", "after_sweep", "after_newton", "growth")]
            cosines = [f"{found[key]:.2f}" for key in ("cosine_sweep", "cosine_newton")]
            probes.append([name, step, *distances, *cosines, "do not" if settle is None else settle])
            print(*probes[-1], sep=" | ", flush=True)
            figures[f"{name}_step_{step}"] = found
    return Found("\n\n".join([_about(counts), _about_costs(lines), _about_training(probes)]), figures)


def _batches(data: Any, number: int) -> Iterator[Batch]:
    """So many training batches of a prepared source, epoch after epoch."""
    made = 0
    while made < number:
        for batch in data.train_dataloader():
            yield {name: part.to(DEVICE) for name, part in batch.items()}
            made += 1
            if made == number:
                return


def _about(counts: list[list[object]]) -> str:
    head = ["gain", "sweeps, from zeros", "Newton steps", "sweeps, from near", "Newton steps"]
    told = (
        f"h = tanh(W h + x), {UNITS} units, W ~ N(0, gain^2 / {UNITS}), x ~ N(0, 1), T {LENGTH}, {TEXTS} texts, fp32: what is made until "
        f"states change by at most {TOLERANCE:g} of their size, the one that finds that included; median, least and most of {SEEDS} "
        f"seeds; at most {MOST_STEPS} Newton steps are tried. Near: exact states with {NOISE:g} of their size added as noise."
    )
    return f"{table(head, counts)}\n\n{told}"


def _about_costs(lines: list[list[object]]) -> str:
    head = ["", "B", "T", "C", "LCT, one sweep", "one Newton step", "exact", "Newton / sweep", "Newton / exact"]
    told = (
        "One training step of one layer or context block, fp32, eager, gradients, clipping and AdamW included; C: width of what is fed "
        "back, and the ways back through the model that a Newton step takes."
    )
    return f"{table(head, lines)}\n\n{told}"


def _about_training(probes: list[list[object]]) -> str:
    head = [
        "",
        "step",
        "lag",
        "after a sweep",
        "after a Newton step",
        "growth",
        "cosine, sweep",
        "cosine, Newton",
        "Newton steps",
    ]
    told = (
        "Trained by Lagged Cache Training with sweeps; distances of what is fed back from the exact states, over their size, before and "
        "after one step from the cached ones; mean largest singular value of the Jacobians at the exact states; cosines of the "
        "parameters' gradients to exact training's; Newton steps until states no longer change, of "
        f"{MOST_STEPS} at most. context: nano, C 128, Bible, 240 blocks of 128 tokens, K 1; delay_copy: C 64, T 16, delay 2, K 3."
    )
    return f"{table(head, probes)}\n\n{told}"


def _spread(counts: Sequence[int | None]) -> str:
    known = sorted(count for count in counts if count is not None)
    if not known:
        return "do not settle"
    missing = len(counts) - len(known)
    more = f", {missing} do not" if missing else ""
    return f"{known[len(known) // 2]} ({known[0]} .. {known[-1]}{more})"
