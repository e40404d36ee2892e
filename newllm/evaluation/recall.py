"""Accuracy of a recall probe by slice, with the memory, without it and with another text's, beside the bytes of the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from newllm.config.fields import Count
from newllm.config.schema import EvaluationConfig
from newllm.data.module import build_data
from newllm.data.prepared import NO_TARGET
from newllm.data.recall import ProbeConfig, ProbeSamples, fresh_draw, not_trained_on
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import token_losses
from newllm.evaluation.streaming import with_memory
from newllm.layers.memory_state import MemoryLayerState
from newllm.models.base import LanguageModel
from newllm.state import parts_of

MemoryUse = Literal["on", "off", "other"]
SPARE_ROWS = 2  # drawn for each row that is measured at another length


@dataclass(frozen=True, kw_only=True)
class RecallConfig(EvaluationConfig):
    """What is measured besides the run's own rows.

    Attributes:
        knock_out: measure memories empty and another text's too; unused without memory layers.
        block_lengths: tokens; the probe is drawn again at each of these lengths, in rows that were not trained on.
        num_blocks: rows of each of these.
    """

    knock_out: bool
    block_lengths: list[Count]
    num_blocks: Count

    def check(self, config: Any) -> list[str]:
        """Return what is wrong between the measurement and the data."""
        if not getattr(config.data, "has_slices", False):
            return [
                f"evaluation=[recall]: measures a recall probe, data of kind {config.data.kind} ask for nothing. "
                "Allowed with it: data=mqar, overwrite, parity, passkey, s3. Leave recall out of the list."
            ]
        longer = [config.data.of_length(length) for length in self.block_lengths]
        return [f"evaluation.recall.block_lengths: {problem}" for data in longer for problem in data.check(config)]


@dataclass(frozen=True)
class Tally:
    """Answers by slice; tallies of several batches add up.

    Attributes:
        correct: right answers [slices].
        targets: all answers [slices].
        outdated: answers that were right before they were overwritten [slices]; None of probes that overwrite nothing.
    """

    correct: Tensor
    targets: Tensor
    outdated: Tensor | None = None

    def __add__(self, other: Tally) -> Tally:
        counts = (self.outdated, other.outdated)
        known = [count for count in counts if count is not None]
        outdated = torch.stack(known).sum(0) if known else None
        return Tally(self.correct + other.correct, self.targets + other.targets, outdated)

    def of(self, slices: list[int]) -> dict[str, Any]:
        """Return accuracy (share of targets; None of none), correct answers and targets of some slices together.

        Where something was overwritten, also the share of answers that are its old value.
        """
        correct, targets = int(self.correct[slices].sum()), int(self.targets[slices].sum())
        found = {"accuracy": correct / targets if targets else None, "correct": correct, "targets": targets}
        if self.outdated is not None:
            found["outdated_share"] = int(self.outdated[slices].sum()) / targets if targets else None
        return found


def measure(material: Material, options: RecallConfig) -> dict[str, Any]:
    """Return how many targets are answered right: of all rows, and by slice on every axis of the probe.

    Args:
        material: model and rows.
        options: what is measured besides.
    Returns:
        `accuracy`, `correct`, `targets`, `chance_accuracy`, `state_bytes` (of one text after a row), `by_<axis>` with the same
        numbers for each bucket; `outdated_share` beside each where keys are overwritten; with memory layers `memory_off` (nothing
        is written, an empty memory is read) and `other_memory` (the memory of another row is read, nothing is written), here and
        in every bucket as accuracies; `by_block_length`.
    """
    found = _measure(material, knock_out=options.knock_out)
    if options.block_lengths:
        found["by_block_length"] = [
            {"block_length": length}
            | _measure(_at_length(material, length, options.num_blocks), knock_out=options.knock_out)
            for length in options.block_lengths
        ]
    return found


def _at_length(material: Material, length: int, num_blocks: int) -> Material:
    """The probe drawn again: rows that were not trained on, nor begin as a row that was, nor are the beginning of one."""
    config, probe = material.run.config, material.run.config.data
    assert isinstance(probe, ProbeConfig), "recall is measured of probes only"
    # Of small spaces a few rows are trained on by chance; one row is what the rules of splitting leave to training.
    spare = SPARE_ROWS * num_blocks
    changes: dict[str, Any] = {
        "validation_share": spare / (spare + 1),
        "test_share": 0.0,
        "max_validation_blocks": None,
    }
    data = dataclasses.replace(fresh_draw(probe, block_length=length, num_samples=spare + 1), **changes)
    module = build_data(dataclasses.replace(config, data=data))
    module.prepare()
    drawn, trained = module.prepared.validation, material.data.prepared.train
    assert isinstance(drawn, ProbeSamples), "probes have drawn rows"
    assert isinstance(trained, ProbeSamples), "probes have drawn rows"
    left = np.flatnonzero(not_trained_on(drawn.rows, trained.rows))
    if len(left) < num_blocks:
        raise ValueError(
            f"evaluation.recall.block_lengths: of {len(drawn)} rows of {length} tokens {len(drawn) - len(left)} are, as far as both go, "
            f"rows that were trained on; evaluation.recall.num_blocks={num_blocks} others are needed. Allowed: lengths at which most "
            "rows are new. Leave this length out or train on fewer rows (data.num_samples)."
        )
    module.validate_on(ProbeSamples(drawn.rows.part(left[:num_blocks])))
    return Material(material.run, lambda: module, "validation")


def _measure(material: Material, *, knock_out: bool) -> dict[str, Any]:
    model, names = material.model, material.data.facts["slices"]
    has_memory = bool(parts_of(model.initial_state(1), MemoryLayerState))
    tallies = {"": _tally(material, "on")}
    if has_memory and knock_out:
        tallies |= {"memory_off": _tally(material, "off"), "other_memory": _tally(material, "other")}
    every = list(range(len(names)))
    found: dict[str, Any] = tallies[""].of(every)
    found["chance_accuracy"] = material.data.facts["chance_accuracy"]
    found["state_bytes"] = model.state_bytes(material.data.data_config.block_length)
    found |= {name: tally.of(every) for name, tally in tallies.items() if name}
    for axis in names[0]:
        found[f"by_{axis}"] = list(_by_axis(tallies, names, axis))
    return found


def _by_axis(tallies: dict[str, Tally], names: list[dict[str, str]], axis: str) -> Iterator[dict[str, Any]]:
    """The buckets of an axis in which something was asked."""
    for bucket in dict.fromkeys(name[axis] for name in names):
        slices = [number for number, name in enumerate(names) if name[axis] == bucket]
        line = {axis: bucket, **tallies[""].of(slices)}
        if line["targets"]:
            yield line | {name: tally.of(slices)["accuracy"] for name, tally in tallies.items() if name}


@torch.inference_mode()
def _tally(material: Material, use: MemoryUse) -> Tally:
    num_slices = len(material.data.facts["slices"])
    total = Tally(torch.zeros(num_slices, dtype=torch.int64), torch.zeros(num_slices, dtype=torch.int64))
    for batch in material.batches():
        if use == "other" and len(batch["input_ids"]) == 1:
            continue  # no other text beside it
        hidden = answering_states(material.model, batch["input_ids"], use)
        is_target = batch["labels"] != NO_TARGET
        masks = [is_target & token_losses(material.model, hidden, batch["labels"])[1], is_target]
        if "outdated" in batch:
            masks.append(is_target & token_losses(material.model, hidden, batch["outdated"])[1])
        total += Tally(*(torch.bincount(batch["slice"][mask].cpu(), minlength=num_slices) for mask in masks))
    return total


@torch.inference_mode()
def answering_states(model: LanguageModel, input_ids: Tensor, use: MemoryUse) -> Tensor:
    """Return the hidden states [B, T, D] of texts from their start, by what their memories hold.

    Args:
        model: with memory layers, unless `use` is "on".
        input_ids: tokens [B, T].
        use: "on" the deployed function; "off" memories stay empty; "other" memories hold all of the text of the row before,
            and nothing more is written.
    """
    if use == "on":
        return model.exact(input_ids).hidden
    state = model.initial_state(len(input_ids))
    if use == "other":
        state = with_memory(state, model.exact(input_ids.roll(1, dims=0)).state)
    return model.exact(input_ids, state, update_memory=False).hidden
