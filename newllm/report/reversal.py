"""`python -m newllm.report.reversal <folders>`: what runs on data=reversal know of facts in both directions, over seeds."""

import sys
from collections.abc import Sequence
from typing import Any

from newllm.report.command import measured_runs, parser_of, readable_runs, refuse
from newllm.report.evaluated import evaluation_of
from newllm.report.groups import Group, group_runs
from newllm.report.statistics import mean_and_deviation

LARGEST = "p, largest"
COLUMNS = (
    ("forward exact match", ("forward", "exact_match")),
    ("reworded", ("forward_reworded", "exact_match")),
    ("backward exact match", ("backward", "exact_match")),
    ("backward MRR", ("backward", "mean_reciprocal_rank")),
    ("by chance", ("backward", "chance_mean_reciprocal_rank")),
    ("backward margin, nats", ("backward", "margin_nats")),
    (LARGEST, ("backward", "p_value")),
    ("forward perplexity", ("forward_perplexity",)),
    ("gap", ("gap",)),
)
SIDES = {"one_way": "one way", "both_ways": "both ways"}
NONE = "-"


def table(groups: Sequence[Group]) -> str:
    """Return a markdown table, one line for each configuration and way of training facts; shares unless a unit is given.

    Mean +- standard deviation over the seeds that tell a number; "-" where none does, because forward exact match was too low.
    """
    head = ["configuration", "facts trained", "seeds", *(title for title, _ in COLUMNS), "FLOPs per emitted token"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups:
        found = [evaluation_of(run)["reversal"] for run in group.by_seed.values()]
        for side, words in SIDES.items():
            measured = [part[side] for part in found if side in part]
            if measured:
                figures = [_over_seeds(title, [_value(part, path) for part in measured]) for title, path in COLUMNS]
                flops = group.facts("flops_per_token")
                cost = f"{flops[0]:.3g}" if flops else NONE
                cells = [group.label, f"{words} ({measured[0]['facts']})", str(len(measured)), *figures, cost]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(part: dict[str, Any], path: Sequence[str]) -> float | None:
    """A number inside the measurement; None where a sentence says why there is none."""
    value: Any = part
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _over_seeds(title: str, values: Sequence[float | None]) -> str:
    told = [value for value in values if value is not None]
    if not told:
        return NONE
    if title == LARGEST:
        return f"{max(told):.2g}"
    mean, deviation = mean_and_deviation(told)
    among = "" if len(told) == len(values) else f" ({len(told)} of {len(values)})"
    return f"{mean:.3g}{'' if deviation is None else f' +- {deviation:.2g}'}{among}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the table is printed, 2 when there is nothing to tell."""
    given = parser_of("reversal", __doc__).parse_args(arguments)
    runs = readable_runs(given.folders)
    measured = measured_runs(runs, "reversal")
    if not measured:
        refuse(runs, "has measured the reversal", "runs with evaluation=[reversal]. Run evaluate.py with it.")
    print(table(group_runs(measured, "val/loss")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
