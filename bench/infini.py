"""A training step of a stack of Infini layers beside infini-transformer-pytorch at equal shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product

from torch import Tensor, nn

from bench.apart import HOW, apart
from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.peers import import_peer, missing, problem_with, version_of
from bench.products import products_alone
from bench.steps import bare_step, num_parameters, parallel_loss, random_ids
from newllm.models.create import create_model

PEER = "infini-transformer-pytorch"
DIM, LAYERS, HEADS, SEGMENT = 128, 4, 4, 64  # nano
# With a vocabulary; with so small a one that the layers are all there is; and without their feed-forward parts. What is left out one
# after another are the same products in both.
VOCABULARIES = {"model": 4096, "layers": 16, "attention": 16}
SHAPES = [(1, 512), (4, 512), (4, 2048)]


class Nothing(nn.Module):
    """In the place of a feed-forward part: adds nothing to the residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


def own_step(batch_size: int, length: int, what: str) -> tuple[nn.Module, Callable[[], object]]:
    """Return our stack and a step of it."""
    vocab_size = VOCABULARIES[what]
    inputs, labels = random_ids(batch_size, length, vocab_size)
    keys = {"stack": ["infini"] * LAYERS, "segment_length": SEGMENT, "memory_heads": HEADS}
    own = create_model("infini", vocab_size=vocab_size, seed=0, **keys).to(DEVICE).train()
    if what == "attention":
        for layer in own.layers:
            layer.mlp, layer.mlp_norm = Nothing(), Nothing()
    return own, bare_step(own, parallel_loss(own, inputs, labels))


def peer_model(what: str) -> nn.Module:
    """Return the peer's stack of equal width, depth and heads, delta rule on."""
    model = import_peer("infini_transformer_pytorch").InfiniTransformer(
        num_tokens=VOCABULARIES[what],
        dim=DIM,
        depth=LAYERS,
        dim_head=DIM // HEADS,
        heads=HEADS,
        use_mem_delta_rule=True,
    )
    if what == "attention":
        for parts in model.layers:
            parts[1] = Nothing()
    return model.to(DEVICE)


def peer_step(batch_size: int, length: int, what: str) -> Callable[[], object]:
    """Return a step of the peer on as many tokens in equal segments."""
    model = peer_model(what)
    wrapper = import_peer("infini_transformer_pytorch").InfiniTransformerWrapper
    # Gradient through all segments, as ours; T + 1 tokens: it shifts them itself.
    segments = wrapper(model, segment_length=SEGMENT, detach_mems_every_num_segments=10**6)
    ids, _ = random_ids(batch_size, length + 1, VOCABULARIES[what])
    return bare_step(model, lambda: segments(ids))


def alternatives(batch_size: int, length: int, what: str, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return a step of both; `stack` ends the process that was started for the peer's."""
    own, step = own_step(batch_size, length, what)
    found = {f"ours, {num_parameters(own)}": step}
    if DEVICE == "cpu":  # a device computes other things beside them
        found["ours, its products alone"] = products_alone(step)
    if problem_with(PEER) is None:
        peer = stack.enter_context(apart(peer_step, batch_size, length, what))
        found[f"{PEER}, {num_parameters(peer_model(what))}"] = peer
    return found


def run(quick: bool) -> Found:
    """Measure all shapes."""
    lines, figures = [], {}
    for (batch_size, length), what in product([(1, 128)] if quick else SHAPES, VOCABULARIES):
        with ExitStack() as stack:
            calls = alternatives(batch_size, length, what, stack)
            rows = take_turns(calls, rounds=2 if quick else 7, min_seconds=1)
        if not quick:
            require_quiet(rows, f"infini, {what}, B {batch_size}, T {length}")
        for row in rows:
            speed, ratio = f"{batch_size * length / row.median:,.0f}", f"{paired_ratio(row, rows[0]):.2f}"
            lines.append([what, batch_size, length, row.name, speed, ratio, f"{row.spread:.0%}"])
            print(*lines[-1], sep=" | ", flush=True)
        figures[f"{what}_B{batch_size}_T{length}"] = {row.name: row.figures() for row in rows}
    told = f"Layers {LAYERS}, D {DIM}, heads {HEADS}, segments of {SEGMENT}, fp32, training step; `model`: V {VOCABULARIES['model']}, "
    told += f"`layers`: V {VOCABULARIES['layers']}, so that next to nothing but the layers is measured; `attention`: the layers without "
    told += "their feed-forward parts. `its products alone`: the matrix products of our step, what is left of it when all else is free."
    if problem_with(PEER) is None:
        told += f" {PEER} {version_of(PEER)}; its feed-forward part is gated, with a third less inner width."
        told += f" It runs {HOW}."
    return Found(
        f"{table(['', 'B', 'T', '', 'tokens/s', 'time / ours', 'spread'], lines)}\n\n{told}{missing([PEER])}", figures
    )
