"""What happened during a run: events.jsonl in its folder, one JSON object a line, and dumps beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from newllm.json_text import to_json
from newllm.whole_file import whole_file, write_whole

EVENTS_FILE = "events.jsonl"
DUMP_FOLDER = "nonfinite"


def write_event(folder: Path, event: dict[str, Any]) -> None:
    """Add one event; it has at least `step` and `event`. A number that is not finite becomes null."""
    with open(folder / EVENTS_FILE, "a") as file:
        file.write(to_json(event))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order; none where nothing happened."""
    path = folder / EVENTS_FILE
    if not path.exists():
        return []
    # What follows the last newline was torn by a kill: the step it tells of is made again.
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]


def keep_events(folder: Path, *, up_to_step: int) -> None:
    """Drop the events after `up_to_step`, which a resumed run meets again."""
    events = read_events(folder)
    kept = [event for event in events if event["step"] <= up_to_step]
    if (folder / EVENTS_FILE).exists():
        write_whole(folder / EVENTS_FILE, "".join(map(to_json, kept)))


def dump(folder: Path, step: int, content: dict[str, Any], *, rank: int = 0) -> str:
    """Write what a step was made from to nonfinite/step_N.pt, loadable with weights_only; return where it lies, or why not.

    A disk without room must not hide the event itself.
    """
    name = f"step_{step}.pt" if rank == 0 else f"step_{step}_rank_{rank}.pt"
    path = folder / DUMP_FOLDER / name
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        return f"not written: {error}"
    return str(path.relative_to(folder))
