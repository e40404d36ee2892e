"""What a run's contexts are worth: their rank, whether they are a fixed point, how long they remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig
from newllm.evaluation.context_statistics import agreement, rank_report, readout_accuracy, spectral_radius, verdict
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import hidden_states
from newllm.models.base import LanguageModel
from newllm.models.create import build_model
from newllm.recurrence import solve, unroll
from newllm.trainers.lag import sweep_map

AGREE = 0.999  # cosine at which two starts came to the same contexts
IDENTITY = 0.95  # cosine to the token embedding from which a context is no more than its token


@dataclass(frozen=True, kw_only=True)
class ContextsConfig(EvaluationConfig):
    """How much is measured."""

    rows: Count  # contexts of which rank and readout are taken
    seed: Annotated[int, Range(minimum=0)]  # of the rows, starts and directions
    sweeps: Count  # from zeros and from noise; as many as a block has tokens would be exact whatever the map is
    passes: Annotated[int, Range(minimum=3)]  # over the same text, each from where the last one ended
    power_iterations: Annotated[int, Range(minimum=2)]  # for the spectral radius
    moved: Annotated[float, Range(above=0)]  # relative change of a context that counts as remembering

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with this measurement on that model."""
        if hasattr(config.model, "context_dim"):
            return []
        return [
            f"evaluation.contexts: measures contexts, a model of kind {config.model.kind} has none. "
            "Allowed: kinds context, context_pythia, new_llm. Take contexts out of evaluation."
        ]


@dataclass(frozen=True)
class _Text:
    """Exact contexts [N, T, C] of N blocks, each from an empty state, and their tokens [N, T]; both outside inference mode."""

    contexts: Tensor
    input_ids: Tensor

    def some_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` of the contexts, drawn without repetition, or all if there are fewer."""
        flat = self.contexts.flatten(0, 1)
        return flat[torch.randperm(len(flat), generator=generator)[:count].to(flat.device)]


def _read(material: Material, model: LanguageModel, rows: int) -> _Text:
    """The first blocks that hold `rows` tokens, or all blocks."""
    contexts, ids, count = [], [], 0
    for batch in material.batches():
        contexts.append(hidden_states(model, batch["input_ids"])[..., : _width(model)].clone())
        ids.append(batch["input_ids"])
        count += ids[-1].numel()
        if count >= rows:
            break
    return _Text(torch.cat(contexts), torch.cat(ids))


def _width(model: LanguageModel) -> int:
    width = getattr(model, "context_dim", None)
    assert isinstance(width, int), "the schema asks for a model with contexts"
    return width


def _context_map(model: LanguageModel, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The map of contexts alone: contexts before [B, T, C] -> contexts [B, T, C]."""
    step, unread = sweep_map(model, input_ids), model.dim - _width(model)
    return lambda previous: step(nn.functional.pad(previous, (0, unread)))[..., : _width(model)]


def _identity(material: Material, text: _Text, seed: int) -> dict[str, Any]:
    """How far contexts are from those of the untrained block over the same embeddings, and from the tokens themselves."""
    model = material.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = build_model(material.run.config, model.vocab_size).to(text.contexts)
    embeddings = {name: value for name, value in model.state_dict().items() if name.startswith("embedding")}
    untrained.load_state_dict(embeddings, strict=False)
    before = _read(material, untrained.eval(), text.input_ids.numel()).contexts
    distance = torch.linalg.vector_norm(text.contexts - before) / torch.linalg.vector_norm(text.contexts)
    found: dict[str, Any] = {"distance_from_untrained": distance.item()}
    tokens = model.get_submodule("embedding")(text.input_ids)
    if tokens.shape[-1] == text.contexts.shape[-1]:
        normed = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        cosine = agreement(text.contexts, normed)["cosine_mean"]
        found |= {"cosine_to_token": cosine, "is_more_than_its_token": cosine < IDENTITY}
    return found


def _fixed_point(
    material: Material, text: _Text, options: ContextsConfig, generator: torch.Generator
) -> dict[str, Any]:
    """Sweeps from zeros and from noise: do they meet, does a small change die out, are they the exact contexts?"""
    exact, step = text.contexts, _context_map(material.model, text.input_ids)
    length = exact.shape[1]
    sweeps = min(options.sweeps, length)
    noise = torch.randn(exact.shape, generator=generator, dtype=exact.dtype).to(exact.device)
    solutions = {
        name: solve(step, start, sweeps=sweeps, statistics=True)
        for name, start in {"zeros": torch.zeros_like(exact), "noise": noise}.items()
    }
    previous = torch.cat([torch.zeros_like(exact[:, :1]), exact[:, :-1]], dim=1)
    radius = spectral_radius(step, previous, iterations=options.power_iterations, generator=generator)
    radius = radius[:, 1:]  # nothing stands before the first position: how it would react to that is no one's question
    starts = agreement(solutions["zeros"].states, solutions["noise"].states)
    return {
        "residual_by_sweep": {name: list(solution.residuals) for name, solution in solutions.items()},
        "sweeps_of_positions": f"{sweeps}/{length}",
        "starts": starts,
        "spectral_radius": {"mean": radius.mean().item(), "largest": radius.max().item()},
        "radius_below_1": _share((radius < 1).sum(), radius.numel()),
        # As many sweeps as positions bring any two starts together.
        "is_fixed_point": bool(sweeps < length and radius.max() < 1 and starts["cosine_least"] > AGREE),
        "parallel_against_exact": agreement(solutions["zeros"].states, exact),
    }


def _share(count: Tensor, total: int) -> str:
    return f"{int(count) / total:.1%} ({int(count)}/{total})"


def _passes(model: LanguageModel, input_ids: Tensor, count: int) -> dict[str, Any]:
    """Pass after pass over the same text: what changes when the context goes round.

    A map that forgets its start makes all passes from the second on the same: CONVERGED then says only that it forgets.
    """
    empty: Any = model.initial_state(len(input_ids))
    state, contexts = empty, []
    for _ in range(count):
        states, last = unroll(model, input_ids, state)
        contexts.append(states[..., : _width(model)])
        state = dataclasses.replace(empty, context=last.context)
    changes = [(new - old).square().mean().item() for old, new in pairwise(contexts)]
    return {"verdict": verdict(changes), "mse_by_pass": changes}


def _memory(material: Material, text: _Text, moved: float) -> dict[str, Any]:
    """How far behind a changed token contexts still move: relative change by distance, and the last distance above `moved`."""
    length = text.input_ids.shape[1]
    place = length // 4  # behind the start of the text, where there is no context yet
    changed = text.input_ids.clone()
    changed[:, place] = (changed[:, place] + 1) % material.model.vocab_size
    others = hidden_states(material.model, changed)[:, place:, : _width(material.model)]
    contexts = text.contexts[:, place:]
    norm = torch.linalg.vector_norm(contexts, dim=-1).clamp_min(1e-30)
    change = (torch.linalg.vector_norm(others - contexts, dim=-1) / norm).mean(0)  # [T - place]
    reach = (change >= moved).nonzero()
    distances = [0, *(2**power for power in range(len(change).bit_length()) if 2**power < len(change))]
    return {
        "change_by_distance": {str(distance): change[distance].item() for distance in distances},
        "reach_tokens": int(reach.max()) if len(reach) else -1,
        "farthest_measured": len(change) - 1,
    }


def _readout(text: _Text, vocab_size: int) -> dict[str, dict[str, float]]:
    """How often a linear map names the token k back, fitted on the first half of the blocks and tested on the second."""
    num_blocks, length = text.input_ids.shape
    found = {}
    for back in (0, 1, 2, 4, 8, 16):
        if back < length and num_blocks > 1:
            contexts, tokens = text.contexts[:, back:], text.input_ids[:, : length - back]
            num_fitted = (num_blocks // 2) * (length - back)
            found[str(back)] = readout_accuracy(
                contexts.flatten(0, 1), tokens.flatten(), vocab_size=vocab_size, num_fitted=num_fitted
            )
    return found


@torch.no_grad()
def measure(material: Material, options: ContextsConfig) -> dict[str, Any]:
    """Return what the contexts of a text hold, every share with its numbers.

    Args:
        material: model with contexts, and text.
        options: how much is measured.
    Returns:
        `effective_rank` (over C, uncentred and centred), `identity` (distance from the untrained block, cosine to the token),
        `fixed_point` (two starts, residuals, spectral radius, parallel against exact contexts), `passes` (verdict over the same
        text again and again), `memory` (reach of a changed token) and `readout` (accuracy by tokens back).
    """
    generator = torch.Generator().manual_seed(options.seed)
    text = _read(material, material.model, options.rows)
    rows = text.some_rows(options.rows, generator)
    few = _Text(text.contexts[:8], text.input_ids[:8])
    return {
        "effective_rank": rank_report(rows),
        "identity": _identity(material, text, material.run.config.seed),
        "fixed_point": _fixed_point(material, few, options, generator),
        "passes": _passes(material.model, few.input_ids, options.passes),
        "memory": _memory(material, few, options.moved),
        "readout": _readout(text, material.model.vocab_size),
    }
