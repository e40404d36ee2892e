"""What memory is worth: loss by segment of the text with it, without it, and with another text's."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from newllm.config.fields import Range
from newllm.config.schema import EvaluationConfig
from newllm.data.module import TextDataModule, build_data
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import token_losses
from newllm.evaluation.streaming import StreamReading
from newllm.layers.memory_layer import MemoryLayer
from newllm.layers.memory_state import MemoryLayerState
from newllm.layers.pythia import PythiaLayer
from newllm.losses.next_token import NO_TARGET
from newllm.models.base import LanguageModel
from newllm.report.statistics import weighted_mean
from newllm.state import parts_of
from newllm.streaming import read_block

WHOLE_MODES = ("exact", "memory_off")  # readings of all targets


@dataclass(frozen=True, kw_only=True)
class MemoryEvaluationConfig(EvaluationConfig):
    """How texts are read, and how segments are counted.

    Attributes:
        context_tokens: tokens before a block that attention without a window still reaches; null: as the run was trained.
        segment_length: tokens; null: of the bottom memory layer; without one the window of attention, or a block.
        resamples: of the texts, for the intervals.
    """

    context_tokens: Annotated[int | None, Range(minimum=0)]
    segment_length: Annotated[int | None, Range(minimum=1)]
    resamples: Annotated[int, Range(minimum=1)]

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the measurement and the data."""
        if config.data.needs_tokenizer:
            return []
        return [
            f"evaluation=[memory]: reads texts from beginning to end, data={config.data.kind} gives samples of their own. "
            "Allowed with it: sources of text. Leave memory out of the list."
        ]


def measure(material: Material, options: MemoryEvaluationConfig) -> dict[str, Any]:
    """Return losses of the readings `StreamReading` makes, over all targets and by segment of the text, and the state's bytes.

    Segments are grouped by doubling: 0, 1, 2-3, 4-7 and so on. What a memory is worth is told as loss without it (or with
    another text's) minus loss with it, nats per token, with the interval of resampled texts: each text's losses are compared with
    its own. One text has no interval. `by_text` holds the sums behind the lines, so that other models can be compared text by text.

    Another text's memory was there for some of the targets only, `targets_other_memory`: `loss_other_memory` is theirs, and so is
    `loss_own_memory`, of the exact reading. They are missing from lines without any.

    Args:
        material: model and text.
        options: how to read and count.
    """
    model, config = material.model, material.run.config
    context_tokens = options.context_tokens
    if context_tokens is None:
        context_tokens = getattr(config.trainer, "context_tokens", 0)
    segment_length = options.segment_length or _segment_length(model) or config.data.block_length
    by_text = _losses_by_text(material, _lanes(material), context_tokens)
    lengths = {text: len(losses["exact"]) for text, losses in by_text.items()}
    edges = _doubling_edges(-(-max(lengths.values()) // segment_length))
    lines, sums_by_text = [], []
    for first, end in edges:
        start, stop = first * segment_length, end * segment_length
        name = str(first) if end == first + 1 else f"{first}-{end - 1}"
        sums = _sums(by_text, start, stop)
        lines.append({"segments": name, **_compare(sums, options.resamples)})
        reached = [text for text, length in lengths.items() if length > start]
        columns = {column: values.tolist() for column, values in sums.items()}
        sums_by_text.append({"segments": name, "texts": reached, **columns})
    everything = _sums(by_text, 0, max(lengths.values()))
    return {
        "all": _compare(everything, options.resamples),
        "by_segment": lines,
        "by_text": sums_by_text,
        "segment_length": segment_length,
        "context_tokens": context_tokens,
        **_bytes(model, config.data.block_length, context_tokens),
    }


def _segment_length(model: LanguageModel) -> int | None:
    """Of the bottom memory layer, else the window of the bottom attention layer: what a position sees without a memory."""
    lengths = [layer.options.segment_length for layer in model.modules() if isinstance(layer, MemoryLayer)]
    windows = [layer.window for layer in model.modules() if isinstance(layer, PythiaLayer)]
    return next(iter([*lengths, *windows]), None)


def _lanes(material: Material) -> TextDataModule:
    """The material's texts in lanes, however the run was trained."""
    if material.data.in_lanes:
        return material.data
    config = dataclasses.replace(material.run.config, data=material.data.data_config)
    data = build_data(config, tokenizer_file=material.run.tokenizer_file, in_lanes=True)
    data.prepare()
    return data


def _losses_by_text(material: Material, data: TextDataModule, context_tokens: int) -> dict[int, dict[str, np.ndarray]]:
    """Nats of every target of each text, in order, by reading; NaN where no other text's memory was there to be read."""
    reading = StreamReading(material.model, context_tokens=context_tokens)
    pieces: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    text_of_row: dict[int, int] = {}
    loader = data.val_dataloader() if material.split == "validation" else data.test_dataloader()
    for cpu_batch in loader:
        batch = {name: tensor.to(material.device) for name, tensor in cpu_batch.items()}
        readings = reading.read(batch)
        losses = {
            mode: token_losses(material.model, hidden, batch["labels"])[0].cpu().numpy()
            for mode, hidden in readings.hidden.items()
        }
        if "other_memory" in losses:
            without = [row for row in range(len(batch["labels"])) if row not in readings.rows_of_other]
            losses["other_memory"][without] = np.nan
        has_target = (cpu_batch["labels"] != NO_TARGET).numpy()
        for row, starts in enumerate(cpu_batch["starts_text"][:, 0].tolist()):
            if starts:
                text_of_row[row] = int(cpu_batch["sample_id"][row])
            for mode, nats in losses.items():
                pieces[text_of_row[row]][mode].append(nats[row, has_target[row]])
    return {
        text: {mode: np.concatenate(parts) for mode, parts in by_mode.items()}
        for text, by_mode in sorted(pieces.items())
    }


def _doubling_edges(num_segments: int) -> list[tuple[int, int]]:
    """First segment and end of each group: 0, 1, 2-3, 4-7, ..."""
    edges, first = [], 0
    while first < num_segments:
        end = max(1, 2 * first)
        edges.append((first, min(end, num_segments)))
        first = end
    return edges


def _sums(by_text: dict[int, dict[str, np.ndarray]], first: int, end: int) -> dict[str, np.ndarray]:
    """Targets, and nats of each reading, of the texts that reach these positions, by name [texts].

    Another text's memory has targets of its own, and beside its nats those of the exact reading on them.
    """
    spans = [
        {mode: nats[first:end] for mode, nats in losses.items()}
        for losses in by_text.values()
        if len(losses["exact"]) > first
    ]
    columns: dict[str, list[float]] = defaultdict(list)
    for losses in spans:
        columns["targets"].append(len(losses["exact"]))
        for mode in WHOLE_MODES:
            if mode in losses:
                columns[f"nats_{mode}"].append(losses[mode].sum())
        if "other_memory" in losses:
            is_read = ~np.isnan(losses["other_memory"])
            columns["targets_other_memory"].append(is_read.sum())
            columns["nats_own_memory"].append(losses["exact"][is_read].sum())
            columns["nats_other_memory"].append(losses["other_memory"][is_read].sum())
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def _compare(sums: dict[str, np.ndarray], resamples: int) -> dict[str, Any]:
    targets = sums["targets"]
    found: dict[str, Any] = _loss(sums["nats_exact"], targets, "")
    if "nats_memory_off" in sums:
        found |= _loss(sums["nats_memory_off"], targets, "_memory_off")
        found |= _difference(sums["nats_memory_off"] - sums["nats_exact"], targets, "memory_off_minus_on", resamples)
    found |= {"texts": len(targets), "targets": int(targets.sum())}
    if "nats_other_memory" not in sums or not sums["targets_other_memory"].any():
        return found
    has_other = sums["targets_other_memory"] > 0
    other, own, read = (sums[f"{name}_memory"][has_other] for name in ("nats_other", "nats_own", "targets_other"))
    found |= _loss(other, read, "_other_memory") | _loss(own, read, "_own_memory")
    found |= _difference(other - own, read, "other_memory_minus_own", resamples)
    return {**found, "texts_other_memory": len(read), "targets_other_memory": int(read.sum())}


def _loss(nats: np.ndarray, targets: np.ndarray, suffix: str) -> dict[str, float]:
    """Nats per token and perplexity, by name."""
    loss = float(nats.sum() / targets.sum())
    return {f"loss{suffix}": loss, f"perplexity{suffix}": math.exp(min(loss, 700))}


def _difference(nats: np.ndarray, targets: np.ndarray, name: str, resamples: int) -> dict[str, float | None]:
    """Mean difference, nats per token, and the percentile interval of resampled texts."""
    mean, low, high = weighted_mean(nats, targets, resamples=resamples)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


@torch.inference_mode()
def _bytes(model: LanguageModel, block_length: int, context_tokens: int) -> dict[str, int]:
    """Bytes that one text carries from block to block: all of its state, and the memories' part of it."""
    ids = torch.zeros(1, block_length, dtype=torch.int64, device=next(model.parameters()).device)
    state = read_block(model, model.initial_state(1), ids, context_tokens=context_tokens).state
    memories = parts_of(state, MemoryLayerState).values()
    return {"state_bytes": state.nbytes, "memory_bytes": sum(part.memory.nbytes for part in memories)}
