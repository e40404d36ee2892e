"""docs/benchmarks.md, made of what is in bench/results: every bench, on every machine that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bench.measure import RESULTS

HEAD = """# Benchmarks

Written by `make bench`, which replaces what was measured on the same kind of machine before. The date of an entry tells of which state of
the code it is.
"""


def page(benches: Mapping[str, str]) -> str:
    """Return the whole page.

    Args:
        benches: titles by name, in their order.
    """
    by_machine = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    sections = []
    for name, title in benches.items():
        found = [of_machine[name] for of_machine in by_machine if name in of_machine]
        if found:
            sections.append("\n".join([f"## {title}\n\n`python -m bench {name}`\n", *map(_part, found)]))
    return "\n".join([HEAD, *sections])


def _part(entry: Mapping[str, Any]) -> str:
    """What one machine measured."""
    about = dict(entry["machine"])
    lines = [f"### {about.pop('device')}, {about.pop('cores')} cores", "\n".join(entry["text"])]
    if "picture" in entry:
        lines.append(f"![{entry['picture']['caption']}]({entry['picture']['file']})")
    lines.append(f"Measured on {about.pop('date')} with {', '.join(f'{key} {value}' for key, value in about.items())}.")
    return "\n\n".join(lines) + "\n"
