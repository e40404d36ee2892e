"""The token delta rule of a whole text: this package's own form beside the CUDA kernel of flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.peers import import_peer, missing, problem_with, version_of
from newllm.layers import fused_delta
from newllm.layers.banks import Banks
from newllm.layers.kernels import DeltaToken
from newllm.layers.segments import Tokens, as_tokens, cut

PEER = "flash-linear-attention"
BATCH, HEADS, HEAD_DIM, SEGMENT = 8, 4, 64, 64
LENGTHS = [512, 2048]


def by_segments(
    queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Return answers and memory as a layer makes them, segment by segment."""
    kernel = DeltaToken()
    empty = kernel.empty(len(queries), 1, *memory.shape[1:3], device=queries.device, dtype=queries.dtype)
    options: dict[str, Any] = {"current": 0, "segments_written": 0, "segments_per_bank": 1, "frozen": (False,)}
    banks, answers = Banks(kernel, empty, **options), []
    projected = torch.stack([tensor.transpose(1, 2) for tensor in (queries, keys, values)], dim=2)
    open_tokens, at_once = Tokens(keys, values, strengths).last(0), banks.segments_at_once()
    for segments in cut(projected, strengths.transpose(1, 2), open_tokens, SEGMENT, at_once=at_once):
        rows = banks.pass_over(segments, writes=True).read_only().answers()
        answers.append(as_tokens(rows, len(segments.queries)).transpose(1, 2))
    return torch.cat(answers, dim=2), banks.memory.matrix[:, 0]


def training(rule: fused_delta.Rule, length: int) -> Callable[[], None]:
    """Return a forward and backward pass over texts of unit queries and keys."""
    shape = BATCH, HEADS, length, HEAD_DIM
    queries, keys, values = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    strengths = torch.rand(*shape[:3], 1, device=DEVICE, requires_grad=True)
    memory = torch.zeros(BATCH, HEADS, HEAD_DIM, HEAD_DIM, device=DEVICE)

    def call() -> None:
        rule(normalize(queries, dim=-1), normalize(keys, dim=-1), values, strengths, memory)[0].sum().backward()

    return call


def run(quick: bool) -> Found:
    """Measure where the peer is installed; elsewhere its absence is told beside the own form."""
    rules: dict[str, fused_delta.Rule] = {"ours": by_segments}
    verdict = ""
    if problem_with(PEER) is None:
        rule = import_peer("fla.ops.delta_rule").chunk_delta_rule
        rules[PEER] = lambda *given: fused_delta.pass_over(rule, *given)
        options: dict[str, Any] = {"num_heads": HEADS, "head_dim": HEAD_DIM, "device": DEVICE}
        problem = fused_delta.problem_with(rule, DeltaToken().as_one_segment, **options)
        verdict = f" {PEER} {version_of(PEER)}: {problem or 'accepted, its gradients are those of the own form'}."
    lines, figures = [], {}
    for length in [SEGMENT] if quick else LENGTHS:
        rows = take_turns({name: training(rule, length) for name, rule in rules.items()}, rounds=2 if quick else 7)
        if not quick:
            require_quiet(rows, f"fused_delta, T {length}")
        for row in rows:
            lines.append([length, row.name, f"{1000 * row.median:.1f} ms", f"{paired_ratio(row, rows[0]):.2f}"])
            print(*lines[-1], sep=" | ", flush=True)
        figures[f"T{length}"] = {row.name: row.figures() for row in rows}
    told = f"Forward and backward, B {BATCH}, {HEADS} heads of {HEAD_DIM}, segments of {SEGMENT}; ours in fp32, the kernel in bf16."
    return Found(f"{table(['T', '', 'duration', 'time / ours'], lines)}\n\n{told}{verdict}{missing([PEER])}", figures)
