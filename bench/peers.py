"""Peers out of their own environment, imported into this process: the same torch, threads and neighbours as ours."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from bench.setup_peers import CUDA_PEERS, FOLDER, PEERS, REPORT


def problem_with(name: str) -> str | None:
    """Return why a peer cannot be measured, None where it can."""
    if not REPORT.exists():
        return "not installed; run make bench-setup"
    told = json.loads(REPORT.read_text())["peers"].get(name)
    return "not installed; run make bench-setup" if told is None else told["problem"]


def version_of(name: str) -> str:
    """Return the installed version."""
    return json.loads(REPORT.read_text())["peers"][name]["version"]


def put_on_path() -> None:
    """Have peers found by imports; before any, because packages look once, as they are imported, for those they work with."""
    for python in sorted((FOLDER / "lib").glob("python*")):
        if (folder := str(python / "site-packages")) not in sys.path:
            sys.path.append(folder)


def import_peer(module: str) -> Any:
    """Return a module of the peers' environment; what ours has as well, torch above all, comes from ours."""
    put_on_path()
    return importlib.import_module(module)


def missing(names: list[str]) -> str:
    """Return one sentence for each of the peers that is not there, as markdown."""
    assert set(names) <= set(PEERS | CUDA_PEERS), "unknown peer"
    found = {name: problem_with(name) for name in names}
    return "".join(f"\n\n{name}: not measured ({problem})." for name, problem in found.items() if problem is not None)
