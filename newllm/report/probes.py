"""Recall probes, read from run folders: of each kind of memory, at each size of state, the setting that counts, and its answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from newllm.report.collect import RunCurves
from newllm.report.evaluated import evaluation_of, with_measurement
from newllm.report.groups import Group, group_runs, memory_kernel, memory_name, stack_name
from newllm.report.statistics import Difference, paired_difference

METRIC = "val/accuracy"  # as training went on; decides the order of groups, no figure
PAPER = "elu"  # the kernel that others are measured against
EQUAL_BYTES = 0.05  # of the paper's state: centred keeps a vector and a count more
READINGS = ("accuracy", "memory_off", "other_memory", "outdated_share")


class Bucket(NamedTuple):
    """Targets that are told apart.

    Attributes:
        axis: by what, as `segments`.
        name: as `4-7`.
        block_length: tokens of a row.
    """

    axis: str
    name: str
    block_length: int


@dataclass(frozen=True)
class Slice:
    """What is answered in one bucket.

    Attributes:
        bucket: what is asked.
        targets: of one seed.
        shares: of the targets, by reading and seed: right answers (accuracy; with memory_off; with other_memory) and
            answers that were right before (outdated_share).
    """

    bucket: Bucket
    targets: int
    shares: dict[str, list[float]]


@dataclass(frozen=True)
class Memory:
    """One kind of memory at one size of state, in its best setting.

    Attributes:
        group: the runs of the setting.
        state_bytes: of one text after a row.
        tried: settings that it is the best of, such as learning rates.
    """

    group: Group
    state_bytes: int
    tried: int

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the runs."""
        return self.group.runs[0].settings

    @property
    def name(self) -> str:
        """Layers and kernel, in words."""
        return memory_name(self.settings)

    @property
    def accuracies(self) -> dict[int, float]:
        """Share of targets answered right by the best weights, by seed."""
        return _accuracies(self.group)

    def knocked_out(self, reading: str) -> list[float]:
        """Return the accuracy without memory (memory_off) or with another text's (other_memory), of each seed measured."""
        return [found[reading]["accuracy"] for found in self._measured() if reading in found]

    def slices(self) -> list[Slice]:
        """Return the answers by bucket of every axis, at the length of training and at the others that were measured."""
        seeds = [dict(_buckets(found, int(self.settings["data.block_length"]))) for found in self._measured()]
        shared = [bucket for bucket in (seeds[0] if seeds else ()) if all(bucket in entries for entries in seeds)]
        return [_slice(bucket, [entries[bucket] for entries in seeds]) for bucket in shared]

    def _measured(self) -> list[dict[str, Any]]:
        return [_recall_of(run) for run in self.group.by_seed.values()]


@dataclass(frozen=True)
class Probe:
    """Memories that were asked the same rows, by name and rising bytes.

    Attributes:
        name: kind of the data.
        chance: share of targets that guessing answers right; None where no run says.
    """

    name: str
    chance: float | None
    memories: Sequence[Memory]

    def paper(self, memory: Memory) -> Memory | None:
        """Return the paper's kernel in the same layers with the nearest state; None if none has as many bytes."""
        if memory_kernel(memory.settings) in (None, PAPER):
            return None
        found = [
            (abs(other.state_bytes - memory.state_bytes), place, other)
            for place, other in enumerate(self.memories)
            if memory_kernel(other.settings) == PAPER and stack_name(other.settings) == stack_name(memory.settings)
        ]
        found = [entry for entry in found if entry[0] <= EQUAL_BYTES * entry[2].state_bytes]
        return min(found)[2] if found else None

    def gain(self, memory: Memory) -> Difference | None:
        """Return how much more than the paper's kernel it answers right at equal bytes, seed by seed."""
        paper = self.paper(memory)
        return None if paper is None else paired_difference(memory.accuracies, paper.accuracies)


def probes_of(runs: Sequence[RunCurves]) -> list[Probe]:
    """Return what has been asked, by data; all figures of a run are of one evaluation.

    Args:
        runs: finished ones with evaluation=[recall] and a size of state count; others are left out.
    """
    asked: dict[tuple[str, str], list[RunCurves]] = {}
    for run in with_measurement(runs, "recall")[0]:
        data = run.run.facts.get("data", {})
        asked.setdefault((str(run.settings.get("data.kind")), str(data.get("fingerprint"))), []).append(run)
    probes = [_probe(name, of_data) for (name, _), of_data in sorted(asked.items())]
    return [probe for probe in probes if probe.memories]


def _probe(name: str, runs: Sequence[RunCurves]) -> Probe:
    bundles: dict[tuple[str, int], list[Group]] = {}
    for group in group_runs(runs, METRIC):
        sizes = group.facts("state_bytes")
        if sizes:
            bundles.setdefault((memory_name(group.runs[0].settings), round(fmean(sizes))), []).append(group)
    memories = [Memory(_best(groups), size, len(groups)) for (_, size), groups in sorted(bundles.items())]
    chances = [run.run.facts.get("data", {}).get("chance_accuracy") for run in runs]
    return Probe(name, next((chance for chance in chances if chance is not None), None), memories)


def _best(groups: Sequence[Group]) -> Group:
    """The best on the seeds that all have: a setting tried once cannot win by its one seed's luck. Of equals, the one with most seeds."""
    values = [_accuracies(group) for group in groups]
    shared = set.intersection(*(set(by_seed) for by_seed in values))

    def rank(place: int) -> tuple[float, int]:
        by_seed = values[place]
        return fmean(by_seed[seed] for seed in shared or by_seed), len(by_seed)

    return groups[max(range(len(groups)), key=rank)]


def _accuracies(group: Group) -> dict[int, float]:
    return {seed: _recall_of(run)["accuracy"] for seed, run in group.by_seed.items()}


def _recall_of(run: RunCurves) -> dict[str, Any]:
    found: dict[str, Any] = evaluation_of(run)["recall"]
    return found


def _buckets(found: dict[str, Any], block_length: int) -> Iterator[tuple[Bucket, dict[str, Any]]]:
    """Every bucket and what was answered in it, rows of other lengths last."""
    for axis in (name.removeprefix("by_") for name in found if name.startswith("by_") and name != "by_block_length"):
        yield from ((Bucket(axis, entry[axis], block_length), entry) for entry in found[f"by_{axis}"])
    for longer in found.get("by_block_length", []):
        yield from _buckets(longer, longer["block_length"])


def _slice(bucket: Bucket, seeds: Sequence[dict[str, Any]]) -> Slice:
    """A bucket in runs that differ in their seed only: the same rows and targets."""
    shares = {name: [entry[name] for entry in seeds] for name in READINGS if seeds[0].get(name) is not None}
    return Slice(bucket, seeds[0]["targets"], shares)
