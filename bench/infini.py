"""A training step of a stack of Infini layers beside infini-transformer-pytorch at equal shapes."""

from __future__ import annotations

from collections.abc import Callable

from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.peers import import_peer, missing, problem_with, version_of
from bench.steps import bare_step, num_parameters, parallel_loss, random_ids
from newllm.models.create import create_model

PEER = "infini-transformer-pytorch"
DIM, LAYERS, HEADS, VOCABULARY, SEGMENT = 128, 4, 4, 4096, 64  # nano
SHAPES = [(1, 512), (4, 512), (4, 2048)]


def alternatives(batch_size: int, length: int) -> dict[str, Callable[[], object]]:
    """Return a step of both, of equal width, depth, heads and segments, delta rule on."""
    inputs, labels = random_ids(batch_size, length, VOCABULARY)
    keys = {"stack": ["infini"] * LAYERS, "segment_length": SEGMENT, "memory_heads": HEADS}
    own = create_model("infini", vocab_size=VOCABULARY, seed=0, **keys).to(DEVICE).train()
    found = {f"ours, {num_parameters(own)}": bare_step(own, parallel_loss(own, inputs, labels))}
    if problem_with(PEER) is None:
        peer = import_peer("infini_transformer_pytorch")
        model = peer.InfiniTransformer(
            num_tokens=VOCABULARY, dim=DIM, depth=LAYERS, dim_head=DIM // HEADS, heads=HEADS, use_mem_delta_rule=True
        ).to(DEVICE)
        # Gradient through all segments, as ours; T + 1 tokens: it shifts them itself.
        segments = peer.InfiniTransformerWrapper(model, segment_length=SEGMENT, detach_mems_every_num_segments=10**6)
        ids, _ = random_ids(batch_size, length + 1, VOCABULARY)
        found[f"{PEER}, {num_parameters(model)}"] = bare_step(model, lambda: segments(ids))
    return found


def run(quick: bool) -> Found:
    """Measure all shapes."""
    lines, figures = [], {}
    for batch_size, length in [(1, 128)] if quick else SHAPES:
        rows = take_turns(alternatives(batch_size, length), rounds=2 if quick else 5)
        if not quick:
            require_quiet(rows, f"infini, B {batch_size}, T {length}")
        for row in rows:
            speed, ratio = f"{batch_size * length / row.median:,.0f}", f"{paired_ratio(row, rows[0]):.2f}"
            lines.append([batch_size, length, row.name, speed, ratio, f"{row.spread:.0%}"])
            print(*lines[-1], sep=" | ", flush=True)
        figures[f"B{batch_size}_T{length}"] = {row.name: row.figures() for row in rows}
    told = f"Layers {LAYERS}, D {DIM}, heads {HEADS}, segments of {SEGMENT}, V {VOCABULARY}, fp32, training step."
    if problem_with(PEER) is None:
        told += f" {PEER} {version_of(PEER)}; its feed-forward part is gated, with a third less inner width."
    return Found(
        f"{table(['B', 'T', '', 'tokens/s', 'time / ours', 'spread'], lines)}\n\n{told}{missing([PEER])}", figures
    )
