"""`python -m bench [name ...]`: run the named measurements, all without a name, and tell them in docs/benchmarks.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench import lct_speed

BENCHES: dict[str, tuple[str, Callable[[], str]]] = {
    "lct_speed": ("Lagged Cache Training against exact training, seconds per step", lct_speed.run),
}
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- {name} -->"


def main() -> None:
    """Run what was named."""
    names = sys.argv[1:] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"bench: {', '.join(unknown)} does not exist. Allowed: {', '.join(sorted(BENCHES))}.", file=sys.stderr)
        raise SystemExit(2)
    for name in names:
        title, run = BENCHES[name]
        section = f"## {title}\n\n`python -m bench {name}`\n\n{run()}\n"
        _put(name, section)


def _put(name: str, section: str) -> None:
    """Replace the section between the bench's marks, or add it."""
    mark = MARK.format(name=name)
    text = DOCS.read_text() if DOCS.exists() else "# Benchmarks\n\nWritten by `make bench`.\n"
    before, _, rest = text.partition(mark)
    after = rest.partition(mark)[2] if rest else "\n"
    DOCS.write_text(f"{before.rstrip()}\n\n{mark}\n{section}{mark}\n{after.lstrip()}")


if __name__ == "__main__":
    main()
