"""Losses by segment of whole texts, read from the evaluation.json of runs: sums of each text, the mean over seeds.

N: texts that reach a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from newllm.report.collect import RunCurves
from newllm.report.evaluated import evaluation_of, with_measurement
from newllm.report.groups import Group, group_runs, memory_name
from newllm.report.statistics import weighted_mean

MODES = ("exact", "memory_off", "own_memory", "other_memory")
OF_OTHER = ("own_memory", "other_memory")  # of the targets for which another text's memory was read


@dataclass(frozen=True)
class Segments:
    """Some neighbouring segments of all texts that reach them.

    Attributes:
        name: first and last index, as `4-7`.
        texts: number of each text in the data.
        targets: of each text [N].
        targets_of_other: those of each text for which another text's memory was read [N].
        nats: of each text, mean over seeds, by reading [N]: exact, memory_off; where another text's memory was read at all,
            other_memory, and own_memory, the exact reading of the same targets.
        losses: nats per target of the exact reading, one for each seed.
    """

    name: str
    texts: tuple[int, ...]
    targets: np.ndarray
    targets_of_other: np.ndarray
    nats: dict[str, np.ndarray]
    losses: Sequence[float]

    def loss(self, mode: str) -> float:
        """Return nats per target of a reading."""
        targets = self.targets_of_other if mode in OF_OTHER else self.targets
        return float(self.nats[mode].sum() / targets.sum())

    def is_whole(self, mode: str) -> bool:
        """Return whether a reading has been made of all targets."""
        return mode not in OF_OTHER or bool((self.targets_of_other == self.targets).all())

    def more_than(self, mode: str, other: "Segments | None" = None) -> tuple[float, float | None, float | None]:
        """Return how much higher a reading's loss is than the exact one, of these or of another model, with its interval over texts.

        Args:
            mode: of the reading; that of another text's memory is compared on its own targets.
            other: of the same texts; None for these.
        """
        if mode == "other_memory":
            has_other = self.targets_of_other > 0
            difference = self.nats["other_memory"] - self.nats["own_memory"]
            return weighted_mean(difference[has_other], self.targets_of_other[has_other])
        exact = (self if other is None else other).nats["exact"]
        return weighted_mean(self.nats[mode] - exact, self.targets)


@dataclass(frozen=True)
class Reader:
    """One configuration that has read the texts.

    Attributes:
        group: its runs.
        name: its layers, in words.
        segment_length: tokens.
        state_bytes, memory_bytes: what one text carries from block to block, and the memories' part of it.
        segments: from the first.
    """

    group: Group
    name: str
    segment_length: int
    state_bytes: int
    memory_bytes: int
    segments: Sequence[Segments]

    def paired(self, own: Segments, reference: "Reader | None") -> Segments | None:
        """Return the same segments of the same texts as the reference read them; None where there are none."""
        if reference is None or reference is self or reference.segment_length != self.segment_length:
            return None
        found = [theirs for theirs in reference.segments if (theirs.name, theirs.texts) == (own.name, own.texts)]
        return found[0] if found else None


@dataclass(frozen=True)
class Corpus:
    """Readers of the same texts, the best first.

    Attributes:
        name: kind of the data.
        readers: all configurations.
    """

    name: str
    readers: Sequence[Reader]

    @property
    def reference(self) -> Reader | None:
        """The best reader without memory."""
        return next((reader for reader in self.readers if reader.memory_bytes == 0), None)


def corpora_of(runs: Sequence[RunCurves]) -> list[Corpus]:
    """Return what has been measured, by data.

    Args:
        runs: finished ones whose evaluation.json holds `memory` count; others are left out.
    Raises:
        ValueError: runs that differ in their seed only were measured on different texts.
    """
    measured = [run for run in with_measurement(runs, "memory")[0] if "by_text" in _memory_of(run)]
    found: dict[tuple[str, str], list[Reader]] = {}
    for group in group_runs(measured, "val/loss"):
        run = group.runs[0]
        key = (str(run.settings.get("data.kind")), str(run.run.facts.get("data", {}).get("fingerprint")))
        found.setdefault(key, []).append(_reader(group))
    return [Corpus(name, readers) for (name, _), readers in sorted(found.items())]


def _memory_of(run: RunCurves) -> dict[str, Any]:
    found: dict[str, Any] = evaluation_of(run)["memory"]
    return found


def _reader(group: Group) -> Reader:
    runs = list(group.by_seed.values())
    seeds = [_memory_of(run) for run in runs]
    first = seeds[0]
    for run, found in zip(runs, seeds, strict=True):
        if _what_was_read(found) != _what_was_read(first):
            raise ValueError(
                f"{run.run.folder}: evaluation=[memory] was measured on other texts than in {runs[0].run.folder}. "
                "Allowed: the same for all seeds. Run evaluate.py on both with the same options."
            )
    sizes = {name: first[name] for name in ("segment_length", "state_bytes", "memory_bytes")}
    segments = [_segments([seed["by_text"][place] for seed in seeds]) for place in range(len(first["by_text"]))]
    return Reader(group, memory_name(group.runs[0].settings), segments=segments, **sizes)


def _what_was_read(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(part[name] for name in ("segments", "texts", "targets")) for part in found["by_text"]]


def _segments(seeds: Sequence[dict[str, Any]]) -> Segments:
    """The same segments in runs that differ in their seed only: the same texts and targets."""
    targets = np.array(seeds[0]["targets"], dtype=np.float64)
    of_other = np.array(seeds[0].get("targets_other_memory", np.zeros(len(targets))), dtype=np.float64)
    modes = [mode for mode in MODES if f"nats_{mode}" in seeds[0] and (mode not in OF_OTHER or of_other.any())]
    nats = {mode: np.mean([seed[f"nats_{mode}"] for seed in seeds], axis=0) for mode in modes}
    losses = [sum(seed["nats_exact"]) / targets.sum() for seed in seeds]
    return Segments(seeds[0]["segments"], tuple(seeds[0]["texts"]), targets, of_other, nats, losses)
