"""`python -m bench [--quick] [name ...]`: run the named measurements, all without a name, and tell them in docs/benchmarks.md.

With --quick sizes are tiny and nothing is written: it shows whether everything runs.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from bench.measure import NotWrittenError, machine, write

# From the shortest; a title, and where the bench stands.
BENCHES = {
    "startup": "Start-up",
    "chunked_loss": "Next-token loss over a large vocabulary in chunks",
    "framework": "Framework tax: train.py against a bare loop of the same model",
    "training": "Training tokens per second beside other trainers",
    "infini": "Infini-attention beside infini-transformer-pytorch",
    "memory_layers": "Cost per token of the memory layers",
    "fixed_points": "Sweeps beside torchdeq's solver",
    "generation": "Generation from the state",
    "session": "A session over a million tokens",
    "cvfp_phase1": "CVFP phase 1 against exact passes and steps for every token",
    "lct_speed": "Lagged Cache Training against exact training",
    "scaling": "How cost grows",
    "tokenising": "Tokenising beside the tokenizers library",
    "streaming_memory": "Memory of a streamed corpus",
    "faults": "Killed at any moment",
}
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- {name} -->"


def main() -> None:
    """Run what was named."""
    quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--quick"] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"bench: {', '.join(unknown)} does not exist. Allowed: {', '.join(sorted(BENCHES))}.", file=sys.stderr)
        raise SystemExit(2)
    refused = False
    for name in names:
        print(f"== {name}", flush=True)
        about, started = machine(), time.monotonic()
        try:
            found = importlib.import_module(f"bench.{name}").run(quick)
        except NotWrittenError as problem:
            print(problem, file=sys.stderr)
            refused = True
            continue
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
        if quick:
            print(found.text)
            continue
        write(name, about, found.figures)
        where = ", ".join(f"{key} {value}" for key, value in about.items())
        text = f"## {BENCHES[name]}\n\n`python -m bench {name}`\n\n{found.text}\n\nMeasured on: {where}.\n"
        _put(name, text)
    raise SystemExit(int(refused))


def _put(name: str, section: str) -> None:
    """Replace the section between the bench's marks, or add it."""
    mark = MARK.format(name=name)
    text = DOCS.read_text() if DOCS.exists() else "# Benchmarks\n\nWritten by `make bench`.\n"
    before, _, rest = text.partition(mark)
    after = rest.partition(mark)[2] if rest else "\n"
    DOCS.write_text(f"{before.rstrip()}\n\n{mark}\n{section}{mark}\n{after.lstrip()}")


if __name__ == "__main__":
    main()
