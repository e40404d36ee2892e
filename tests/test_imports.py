"""Who may import whom: an arrow never runs upward, not even from inside a function."""

import ast
from pathlib import Path

import pytest

import newllm

PACKAGE = Path(newllm.__file__).parent
ABOVE = {
    "layers": ("callbacks", "data", "evaluation", "guards", "models", "run", "session", "trainers"),
    "models": ("callbacks", "data", "evaluation", "guards", "run", "session", "trainers"),
    "losses": ("callbacks", "data", "evaluation", "guards", "run", "session", "trainers"),
    "data": ("callbacks", "evaluation", "guards", "models", "run", "session", "trainers"),
    "report": ("callbacks", "data", "evaluation", "guards", "layers", "models", "run", "session", "trainers"),
}
"""For each folder the parts of the package that stand above it, or beside it with nothing in common."""
SHARED = {"report": {"newllm.guards.detectors"}}
"""Modules of plain numbers that a folder takes from beside it: a picture marks what the guard itself would find."""


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", sorted(ABOVE))
def test_no_folder_imports_what_stands_above_it(folder: str) -> None:
    forbidden = {f"newllm.{part}" for part in ABOVE[folder]}

    upward = {
        f"{file.name}: {name}"
        for file in (PACKAGE / folder).glob("*.py")
        for name in imported(file)
        if ".".join(name.split(".")[:2]) in forbidden
        and not any(f"{name}.".startswith(f"{shared}.") for shared in SHARED.get(folder, ()))
    }

    assert upward == set()


@pytest.mark.parametrize("folder", ["layers", "models"])
def test_models_are_plain_modules(folder: str) -> None:
    names = {name.split(".")[0] for file in (PACKAGE / folder).glob("*.py") for name in imported(file)}

    assert names & {"hydra", "lightning", "omegaconf"} == set()
