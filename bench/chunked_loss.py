"""The next-token loss at Pythia's vocabulary, forward and backward: whole logits against chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from bench.measure import DEVICE, Found, paired_ratio, peak_bytes, require_quiet, table, take_turns
from newllm.losses.linear_cross_entropy import mean_nats, rows_of_chunks

ROWS, FEATURES, VOCABULARY = 1024, 512, 50304


def run(quick: bool) -> Found:
    """Measure duration, processor time and peak memory."""
    rows, vocab = (64, 512) if quick else (ROWS, VOCABULARY)
    features = torch.randn(rows, FEATURES, device=DEVICE, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, FEATURES, device=DEVICE)).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    at_once = 16 if quick else rows_of_chunks(features, vocab)

    def plain() -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(nn.functional.linear(features, weight), targets)
        return [loss, *torch.autograd.grad(loss, [features, weight])]

    def chunked() -> list[torch.Tensor]:
        loss = mean_nats(features, weight, None, targets, rows=at_once)
        return [loss, *torch.autograd.grad(loss, [features, weight])]

    both: dict[str, Callable[[], list[torch.Tensor]]] = {"whole logits": plain, "in chunks": chunked}
    differences = [((a - b).norm() / a.norm()).item() for a, b in zip(plain(), chunked(), strict=True)]
    seconds = take_turns(dict(both), rounds=2 if quick else 9)
    if not quick:
        require_quiet(seconds, "chunked_loss")
    ratio = paired_ratio(seconds[1], seconds[0])
    cpu = [_processor_seconds(call) for call in both.values()]
    peaks = [peak_bytes(call) for call in both.values()]
    lines = [
        [row.name, f"{1000 * row.median:.0f} ms", f"{1000 * used:.0f} ms", f"{peak / 2**20:.0f} MiB"]
        for row, used, peak in zip(seconds, cpu, peaks, strict=True)
    ]
    lines.append(["chunks / whole", f"{ratio:.2f}", f"{cpu[1] / cpu[0]:.2f}", f"{peaks[1] / peaks[0]:.2f}"])
    told = (
        f"Rows {rows}, features {FEATURES}, V {vocab}, {at_once} rows at once; loss and gradients, fp32. Relative "
        f"difference of loss, gradient by features and by weights: {', '.join(f'{d:.1e}' for d in differences)}."
    )
    figures = {row.name: row.figures() for row in seconds} | {"processor_seconds": cpu, "peak_bytes": peaks}
    return Found(
        f"{table(['', 'duration', 'processor time', 'peak memory'], lines)}\n\n{told}",
        figures | {"ratio": ratio, "relative_differences": differences},
    )


def _processor_seconds(call: Callable[[], object]) -> float:
    """Least processor time of three calls; other programs do not count in it."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best
