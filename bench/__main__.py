"""`python -m bench [--quick] [--device=cpu] [name ...]`: run the named measurements, all without a name, into docs/benchmarks.md.

With --quick sizes are tiny and nothing is written: it shows whether everything runs. The device is the GPU where there is one.
"""

from __future__ import annotations

import importlib
import sys
import time

import torch

from bench import measure
from bench.measure import DOCS, Found, NotWrittenError, describe_load, is_busy, machine, write
from bench.page import page
from bench.peers import put_on_path
from newllm.host_memory import keep_freed_memory
from newllm.whole_file import write_whole

# From the shortest; a title, and where the bench stands.
BENCHES = {
    "startup": "Start-up",
    "chunked_loss": "Next-token loss over a large vocabulary in chunks",
    "framework": "Framework tax: train.py against a bare loop of the same model",
    "training": "Training tokens per second beside other trainers",
    "infini": "Infini-attention beside infini-transformer-pytorch",
    "memory_layers": "Cost per token of the memory layers",
    "fused_delta": "The token delta rule beside flash-linear-attention",
    "fixed_points": "Sweeps beside torchdeq's solver",
    "generation": "Generation from the state",
    "session": "A session over a million tokens",
    "cvfp_phase1": "CVFP phase 1 against exact passes and steps for every token",
    "lct_speed": "Lagged Cache Training against exact training",
    "newton": "Newton steps beside sweeps and exact training",
    "scaling": "How cost grows",
    "tokenising": "Tokenising beside the tokenizers library",
    "streaming_memory": "Memory of a streamed corpus",
    "faults": "Killed at any moment",
}


def main() -> None:
    """Run what was named."""
    names, device, quick = _asked(sys.argv[1:])
    put_on_path()
    measure.DEVICE = device
    if device == "cpu":
        keep_freed_memory()  # as train.py
    refused = False
    for name in names:
        about, started = machine(), time.monotonic()
        print(f"== {name} ({describe_load(about)})", flush=True)
        if is_busy(about):
            print(f"{name}: the machine is busy. Rounds that spread too far will not be written.", file=sys.stderr)
        try:
            found: Found = importlib.import_module(f"bench.{name}").run(quick)
        except NotWrittenError as problem:
            print(f"{problem} Before it began {describe_load(about)}.", file=sys.stderr)
            refused = True
            continue
        except torch.OutOfMemoryError as problem:
            fitted = "; ".join(measure.fitted) or "none of this bench's sizes"
            print(f"{name}: out of memory ({problem}). Allowed: what fits, so far {fitted}.", file=sys.stderr)
            refused = True
            continue
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
        if quick:
            print(found.text)
            continue
        write(name, about, found)
        write_whole(DOCS / "benchmarks.md", page(BENCHES))
    raise SystemExit(int(refused))


def _asked(arguments: list[str]) -> tuple[list[str], str, bool]:
    """The names, the device, and whether sizes are to be tiny; ends with code 2 at what there is not."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    devices = [argument.removeprefix("--device=") for argument in arguments if argument.startswith("--device=")]
    options = {argument for argument in arguments if argument.startswith("--")} - {f"--device={d}" for d in devices}
    problems = [
        *_unknown("bench:", sorted(set(names) - set(BENCHES)), sorted(BENCHES)),
        *_unknown("bench --device:", sorted(set(devices) - set(measure.DEVICES)), sorted(measure.DEVICES)),
        *_unknown("bench:", sorted(options - {"--quick"}), ["--device=<device>", "--quick"]),
    ]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise SystemExit(2)
    return names or list(BENCHES), (devices or [measure.DEVICE])[-1], "--quick" in options


def _unknown(where: str, given: list[str], allowed: list[str]) -> list[str]:
    """A sentence about what does not exist here, none where all does."""
    if not given:
        return []
    return [f"{where} {', '.join(given)} does not exist here. Allowed: {', '.join(allowed)}. Choose among these."]


if __name__ == "__main__":
    main()
