"""512 new tokens written stepwise from the state, beside reading the whole prefix anew for every token."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch

from bench.measure import DEVICE, Found, Row, paired_ratio, require_quiet, table
from newllm.config.compose import compose
from newllm.generation import GREEDY, generate
from newllm.models.base import LanguageModel, ModelOutput
from newllm.models.create import build_model

VOCABULARY = 4096
PROMPT = 16  # tokens
NEW = 512  # tokens
EDGE = 64  # tokens at either end whose durations are compared
# What model and layers are called on the command line.
MODELS = {
    "pythia": ["model=pythia"],
    "infini": ["model=infini"],
    "every layer infini": ["model=pythia", "layers=all_infini"],
    "selective": ["model=selective"],
    "context": ["model=context", "trainer=lct"],
}
BOUNDED = ("every layer infini", "context")
"""Their state stops growing, so a token must cost the same wherever it stands."""
STEPWISE_ONLY = ("context",)
"""A recurrence reads every prefix one position after another: minutes for what the others do in seconds."""


class Clocked:
    """A model that notes when each of its steps begins.

    Args:
        model: the model.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.times: list[float] = []

    def exact(self, input_ids: torch.Tensor, state: Any, *, update_memory: bool = True) -> ModelOutput:
        """Return what the model returns."""
        self.times.append(_now())
        return self.model.exact(input_ids, state, update_memory=update_memory)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model returns."""
        return self.model.logits(hidden)


def build(name: str) -> LanguageModel:
    """Return a nano model with random weights: speed does not depend on them."""
    torch.manual_seed(0)
    return build_model(compose(MODELS[name]), VOCABULARY).to(DEVICE).eval()


def stepwise(model: LanguageModel, prompt: torch.Tensor, new: int) -> list[float]:
    """Return the seconds of each new token but the first, from the state of the one before it."""
    clocked = Clocked(model)
    generate(clocked, prompt, max_new_tokens=new, options=GREEDY)
    times = [*clocked.times[1:], _now()]
    return [after - before for before, after in itertools.pairwise(times)]


@torch.inference_mode()
def recomputed(model: LanguageModel, prompt: torch.Tensor, new: int) -> list[float]:
    """Return the seconds of each new token but the first, every one after the whole text before it."""
    ids, seconds = prompt, []
    for _ in range(new):
        started = _now()
        token = model.logits(model.exact(ids).hidden[:, -1]).argmax(-1, keepdim=True)
        seconds.append(_now() - started)
        ids = torch.cat([ids, token], dim=1)
    return seconds[1:]


def run(quick: bool) -> Found:
    """Measure every model: seconds for all tokens, and whether the last ones cost what the first did."""
    new, edge, rounds = (8, 2, 1) if quick else (NEW, EDGE, 3)
    lines, figures = [], {}
    for name in MODELS:
        model, prompt = build(name), torch.randint(VOCABULARY, (1, PROMPT), device=DEVICE)
        stepwise(model, prompt, min(new, EDGE))  # warm-up
        both = name not in STEPWISE_ONLY
        found = [(stepwise(model, prompt, new), recomputed(model, prompt, new) if both else []) for _ in range(rounds)]
        steps = Row("stepwise", [sum(each) for each, _ in found], 0.0)
        whole = Row("whole prefix", [sum(each) for _, each in found], 0.0)
        if not quick:
            require_quiet([steps, whole] if both else [steps], f"generation, {name}")
        first = statistics.median(statistics.median(each[:edge]) for each, _ in found)
        last = statistics.median(statistics.median(each[-edge:]) for each, _ in found)
        lines.append(
            [
                name,
                "bounded" if name in BOUNDED else "grows",
                f"{steps.median:.2f} s",
                *([f"{whole.median:.2f} s", f"{paired_ratio(whole, steps):.1f}"] if both else ["-", "-"]),
                *(f"{1000 * seconds:.2f} ms" for seconds in (first, last)),
                f"{last / first:.2f}",
            ]
        )
        print(*lines[-1], sep=" | ", flush=True)
        figures[name] = {"stepwise": steps.figures(), "last_over_first": last / first}
        if both:
            figures[name] |= {"whole_prefix": whole.figures(), "whole_over_stepwise": paired_ratio(whole, steps)}
    head = ["model", "state", f"{new} tokens", "whole prefixes", "ratio", f"first {edge}", f"last {edge}", "ratio"]
    told = (
        f"Nano models, one text, {PROMPT} tokens of prompt, greedy, fp32. The ratio of whole prefixes to steps grows with the text. "
        f"`first {edge}` and `last {edge}`: median seconds of a token at the beginning and at the end of a text written stepwise; "
        "where the state is bounded they are the same."
    )
    return Found(f"{table(head, lines)}\n\n{told}", figures)


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
