"""Cost per token of a step of every memory layer over the length of the text, and of delta_token over its token loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.measure import DEVICE, Found, Row, paired_ratio, require_quiet, table, take_turns
from newllm.models.create import create_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEGMENT, BATCH = 64, 1
TRAINED_BATCH = 8  # as conf/data has it: what a step of training pays
LENGTHS = [256, 1024, 4096, 8192, 32768]
LOOP_DIMS = [64, 128]  # of the one head that is compared with its token loop
# (name shown, model, keys): one layer each, as conf/ has them.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("pythia", {}),
    "infini, elu": ("infini", {}),
    "infini, softmax local": ("infini", {"local": "softmax"}),
    "infini, centred": ("infini", {"memory_kernel": "centred"}),
    "infini, ridge": ("infini", {"memory_kernel": "ridge", "memory_heads": 8}),
    "infini, delta_token": ("infini", {"memory_kernel": "delta_token"}),
    "multi_memory": ("multi_memory", {}),
    "hierarchical": ("hierarchical", {}),
}


def layer_of(name: str) -> nn.Module:
    """Return the bottom layer of the nano model."""
    model, keys = LAYERS[name]
    own = {} if model == "pythia" else {"segment_length": SEGMENT}
    return create_model(model, vocab_size=16, seed=0, **own, **keys).layers[0].to(DEVICE)  # type: ignore[union-attr,index]


def step(layer: nn.Module, hidden: Tensor) -> Callable[[], None]:
    """Return a forward and backward pass over a text from its start."""
    state = layer.initial_state(len(hidden), device=hidden.device, dtype=hidden.dtype)  # type: ignore[operator]
    return lambda: layer(hidden, state)[0].sum().backward()


def token_loop(queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor) -> Tensor:
    """Return what the delta rule answers [T, d], one token after another: M += s k (v - k M)."""
    memory, answers = keys.new_zeros(keys.shape[1], values.shape[1]), []
    for q, k, v, s in zip(queries, keys, values, strengths, strict=True):
        memory = memory + s * torch.outer(k, v - k @ memory)
        answers.append(q @ memory)
    return torch.stack(answers)


def delta_against_loop(length: int, dim: int, rounds: int) -> tuple[list[Row], float]:
    """Return the rows of the loop and of the kernel in segments on a head of `dim`, forward and backward, and the loop's ratio."""
    from newllm.layers.banks import Banks
    from newllm.layers.kernels import make_kernel
    from newllm.layers.segments import Tokens, as_tokens, cut

    queries, keys, values = (torch.randn(length, dim, device=DEVICE, requires_grad=True) for _ in range(3))
    strengths = torch.rand(length, 1, device=DEVICE, requires_grad=True)

    def loop() -> None:
        q, k = (nn.functional.normalize(tensor, dim=-1) for tensor in (queries, keys))
        token_loop(q, k, values, strengths).sum().backward()

    def chunked() -> None:
        kernel = make_kernel("delta_token", None, 1.0)
        memory = kernel.empty(1, 1, 1, dim, device=queries.device, dtype=queries.dtype)
        options: dict[str, Any] = {"current": 0, "segments_written": 0, "segments_per_bank": 1, "frozen": (False,)}
        banks, answers = Banks(kernel, memory, **options), []
        projected = torch.stack([queries, keys, values], dim=1)[None, :, :, None]
        open_tokens = Tokens(*(tensor[None, None] for tensor in (keys, values, strengths))).last(0)
        at_once = banks.segments_at_once()
        for segments in cut(projected, strengths[None, :, None], open_tokens, SEGMENT, at_once=at_once):
            rows = banks.pass_over(segments, writes=True).read_only().answers()
            answers.append(as_tokens(rows, len(segments.queries)))
        torch.cat(answers, dim=1).sum().backward()

    rows = take_turns({"token loop": loop, "delta_token": chunked}, rounds=rounds, warmups=1)
    return rows, paired_ratio(rows[0], rows[1])


def batched_ratios(layers: dict[str, nn.Module], length: int, rounds: int) -> dict[str, float]:
    """Return the duration of each layer's step over that of pythia's, with as many texts side by side as a step of training has."""
    hidden = torch.randn(TRAINED_BATCH, length, 128, device=DEVICE, requires_grad=True)
    rows = take_turns({name: step(layer, hidden) for name, layer in layers.items()}, rounds=rounds, warmups=2)
    base = next(row for row in rows if row.name == "pythia")
    return {row.name: paired_ratio(row, base) for row in rows}


def run(quick: bool) -> Found:
    """Measure all layers at all lengths."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    layers = {name: layer_of(name) for name in LAYERS}
    per_token: dict[str, dict[int, float]] = {name: {} for name in layers}
    figures: dict[str, Any] = {}
    for length in lengths:
        hidden = torch.randn(BATCH, length, 128, device=DEVICE, requires_grad=True)
        # Attention over everything is not flat: at the greatest length a step of it takes a minute.
        chosen = {name: layer for name, layer in layers.items() if name != "pythia" or length <= 8192}
        calls: dict[str, Callable[[], object]] = {name: step(layer, hidden) for name, layer in chosen.items()}
        rows = take_turns(calls, rounds=2 if quick else 3 if length > 8192 else 5, warmups=1 if length > 1024 else 2)
        if not quick:
            require_quiet(rows, f"memory_layers, T {length}")
        for row in rows:
            per_token[row.name][length] = 1e6 * row.median / (BATCH * length)
        figures[f"T{length}"] = {row.name: row.figures() for row in rows}
        print(length, {row.name: round(per_token[row.name][length], 1) for row in rows}, flush=True)
    trained = batched_ratios(layers, lengths[0], rounds=2 if quick else 9)
    base = per_token["pythia"][lengths[0]]
    lines = []
    for name, found in per_token.items():
        first = found[lengths[0]]
        costs = [f"{found[n]:.1f}" if n in found else "" for n in lengths]
        lines.append(
            [name, *costs, f"{first / base:.2f}", f"{trained[name]:.2f}", f"{max(found.values()) / first:.2f}"]
        )
    loops = {dim: delta_against_loop(128 if quick else 2048, dim, rounds=2 if quick else 5) for dim in LOOP_DIMS}
    figures |= {
        "microseconds_per_token": per_token,
        f"over_pythia_at_B{TRAINED_BATCH}": trained,
        "token_loop_over_delta_token": {dim: ratio for dim, (_, ratio) in loops.items()},
    }
    head = ["layer", *[f"T {n}" for n in lengths], f"/ pythia at T {lengths[0]}"]
    head += [f"the same at B {TRAINED_BATCH}", "dearest / first"]
    against = ", ".join(
        f"{ratio:.1f} times as fast on a head of {dim} ({rows[0].median:.2f} s, {rows[1].median:.3f} s)"
        for dim, (rows, ratio) in loops.items()
    )
    told = (
        f"Microseconds per token of a forward and backward pass of one layer, D 128, B {BATCH}, segments of {SEGMENT}, fp32. "
        f"Segments are written one after another: with a single text, calls cost as much as the products in them.\n\n"
        f"delta_token against a loop over {128 if quick else 2048} tokens: {against}."
    )
    return Found(f"{table(head, lines)}\n\n{told}", figures, ("Cost per token over length", _drawn(per_token)))


def _drawn(per_token: dict[str, dict[int, float]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, found in per_token.items():
        axes.loglog(list(found), list(found.values()), marker="o", label=name, base=2)
    axes.set(xlabel="T, tokens of a text", ylabel="microseconds per token", title="One layer, forward and backward")
    axes.legend(fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure
