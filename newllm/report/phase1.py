"""`python -m newllm.report.phase1 <folders>`: what phase 1 of CVFP came to and what phase 2 predicts from it, over seeds."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from newllm.report.collect import RunCurves
from newllm.report.command import parser_of, readable_runs, refuse
from newllm.report.groups import Group, group_runs
from newllm.report.statistics import mean_and_deviation
from newllm.report.tables import NONE, number, spread

METRIC = "val/loss"
TEXTS = ("train", "validation")
# As a run tells a share: `12.5% (1/8)`.
SHARE = re.compile(r"\((?P<part>[\d.]+)/(?P<whole>\d+)\)")


def contexts_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what contexts swept clean are like, by text: of the run's own phase 1, or of the one it built on; empty without."""
    phase1 = facts.get("phase1")
    found = phase1.get("contexts") if isinstance(phase1, dict) else facts.get("contexts")
    return found or {}


def table(groups: Sequence[Group]) -> str:
    """Return a markdown table, one line for each configuration that has a phase 1 or leaves it out.

    Converged contexts are summed over seeds; effective ranks (uncentred), losses and predictions are means +- standard deviations.
    """
    titles = [f"{title}, {text}" for title in ("converged", "effective rank", "fixed-point loss") for text in TEXTS]
    titles += [f"diversity loss, {text}" for text in TEXTS]
    head = ["configuration", "seeds", "finished", *titles, "iterations", "val/perplexity", "val/accuracy"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups:
        runs = list(group.by_seed.values())
        if not any(has_phase1(run) for run in runs):
            continue
        cells = [group.label, str(len(runs)), f"{group.num_finished}/{len(group.runs)}"]
        cells += [_pooled(_told(runs, text, "converged_share")) for text in TEXTS]
        cells += [_rank(_told(runs, text, "effective_rank", "uncentred")) for text in TEXTS]
        cells += [_spread(_told(runs, text, f"{loss}_loss")) for loss in ("fixed_point", "diversity") for text in TEXTS]
        cells += [_iterations(runs)]
        cells += [spread(list(group.values(name).values())) for name in ("val/perplexity", "val/accuracy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def has_phase1(run: RunCurves) -> bool:
    """Return whether a run made a phase 1, built on one, or leaves it out on purpose."""
    return "phase1" in run.run.facts or bool(contexts_of(run.run.facts))


def _told(runs: Sequence[RunCurves], text: str, *path: str) -> list[Any]:
    """What the runs recorded of the contexts of a text, of those that did."""
    found = []
    for run in runs:
        value: Any = contexts_of(run.run.facts).get(text)
        for name in path:
            value = None if value is None else value[name]
        if value is not None:
            found.append(value)
    return found


def _fractions(told: Sequence[str]) -> list[tuple[float, int]]:
    matches = [SHARE.search(share) for share in told]
    return [(float(match["part"]), int(match["whole"])) for match in matches if match is not None]


def _pooled(told: Sequence[str]) -> str:
    fractions = _fractions(told)
    if not fractions:
        return NONE
    part, whole = sum(part for part, _ in fractions), sum(whole for _, whole in fractions)
    return f"{part / whole:.1%} ({part:,.0f}/{whole:,})"


def _rank(told: Sequence[str]) -> str:
    fractions = _fractions(told)
    if not fractions:
        return NONE
    mean, deviation = mean_and_deviation([100 * rank / width for rank, width in fractions])
    rank = sum(rank for rank, _ in fractions) / len(fractions)
    return f"{mean:.1f}{'' if deviation is None else f' +- {deviation:.1f}'}% ({rank:.1f}/{fractions[0][1]})"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.3g}{'' if deviation is None else f' +- {deviation:.1g}'}"


def _iterations(runs: Sequence[RunCurves]) -> str:
    """Iterations of every seed, once where they are the same."""
    phases = [run.run.facts.get("phase1", {"iterations": run.lines[-1]["step"]}) for run in runs if run.lines]
    counts = [number(phase["iterations"] if isinstance(phase, dict) else 0) for phase in phases]
    return "/".join(counts if len(set(counts)) > 1 else counts[:1]) or NONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the table is printed, 2 when there is nothing to tell."""
    given = parser_of("phase1", __doc__).parse_args(arguments)
    runs = readable_runs(given.folders)
    groups = group_runs(runs, METRIC)
    if not any(has_phase1(run) for group in groups for run in group.by_seed.values()):
        kinds = "at least one finished run of trainer=cvfp, cvfp_phase1 or cvfp_phase2"
        refuse(runs, "has finished a phase 1", f"{kinds}. Train one, for instance with sweep=diversity.")
    print(f"{table(groups)}\n\n{_note()}")
    return 0


def _note() -> str:
    return (
        "Contexts under the last weights, swept from zeros without noise. Converged, fixed-point loss: in the last of as many sweeps "
        "as there were iterations; contexts that moved less than trainer.converged_threshold, summed over seeds. Effective rank, "
        "diversity loss: of contexts swept on to the tolerance; rank of singular values, not centred, over the width. "
        "Predictions: exact recurrence, last validation. finished: runs / all, of several with one seed the last one counts."
    )


if __name__ == "__main__":
    sys.exit(main())
