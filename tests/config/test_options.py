"""Every file of conf/ is found by itself: it composes, its kind has a schema, and its schema leaves values to it."""

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from newllm.config import kinds, schema
from newllm.config.compose import ROOTS, examine
from newllm.config.library import chosen_by_default, conf_folder, description, options
from newllm.config.schema import GroupConfig, LayerConfig

EVERY = [(group, option) for group in chosen_by_default("train") for option in options(group)]
GROUP_OF = {"models": "model", "losses": "loss", "trainers": "trainer", "data": "data", "evaluation": "evaluation"}
RUNNABLE = [(group, option) for group, option in EVERY if group in ("experiment", "debug")]


@pytest.mark.parametrize(("group", "option"), EVERY, ids=[f"{group}={option}" for group, option in EVERY])
def test_every_option_composes(group: str, option: str) -> None:
    choice = f"{group}=[{option}]" if group == "evaluation" else f"{group}={option}"

    _, problems = examine([choice], "train", pairs=False)

    assert problems == []


@pytest.mark.parametrize(("group", "option"), RUNNABLE, ids=[f"{group}={option}" for group, option in RUNNABLE])
def test_every_named_run_is_possible(group: str, option: str) -> None:
    _, problems = examine([f"{group}={option}"], "train")

    assert problems == []


@pytest.mark.parametrize(("group", "option"), EVERY, ids=[f"{group}={option}" for group, option in EVERY])
def test_every_option_is_described(group: str, option: str) -> None:
    assert description(group, option)


def test_every_kind_beside_code_is_offered() -> None:
    offered = {base: _kinds_in(GROUP_OF[folder]) for base, folder in kinds.FOLDERS.items() if base is not LayerConfig}

    assert {base.__name__: set(kinds.kinds_of(base)) - offered[base] for base in offered} == {
        base.__name__: set() for base in offered
    }


def _kinds_in(group: str) -> set[str]:
    texts = [file.read_text() for file in (conf_folder() / group).rglob("*.yaml")]
    return {kind for text in texts for kind in re.findall(r"^kind: (\w+)", text, flags=re.MULTILINE)}


def _schemas() -> list[type]:
    beside_code = [kinds.schema_of(base, kind) for base in kinds.FOLDERS for kind in kinds.kinds_of(base)]
    here = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, GroupConfig)]
    return [*filter(None, beside_code), *here, *ROOTS.values()]


@pytest.mark.parametrize("described", _schemas(), ids=lambda described: described.__name__)
def test_no_schema_holds_a_value(described: type) -> None:
    with_default = [f.name for f in fields(described) if f.default is not MISSING or f.default_factory is not MISSING]

    assert with_default == []


def test_every_part_that_options_share_is_used() -> None:
    parts = sorted(conf_folder().glob("*/shared/*.yaml"))

    for part in parts:
        group = part.parents[1]
        users = [file for file in group.glob("*.yaml") if f"shared/{part.stem}" in file.read_text()]
        assert users, f"{part} is part of no option"
        package = "_global_" if group.name == "experiment" else group.name  # a named run changes any group
        assert part.read_text().startswith(f"# @package {package}\n"), part


def test_layers_offers_exactly_the_parameters_of_its_kinds() -> None:
    values = yaml.safe_load((conf_folder() / "layers/shared/parameters.yaml").read_text())
    known = {f.name for kind in kinds.kinds_of(LayerConfig) for f in fields(kinds.schema_of(LayerConfig, kind))}

    assert set(values) == known - {"kind"}


def test_package_of_configuration_imports_no_torch() -> None:
    for file in Path(schema.__file__).parent.glob("*.py"):
        names = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {alias.name for node in names for alias in node.names} | {getattr(n, "module", "") for n in names}
        assert not {"torch", "lightning", "numpy"} & {str(module).partition(".")[0] for module in modules}, file
