"""Finds the schema of a kind beside its code without running that code: schemas are needed before torch is imported."""

import ast
import builtins
import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

from newllm.config.schema import (
    DataConfig,
    EvaluationConfig,
    GroupConfig,
    LayerConfig,
    LossConfig,
    ModelConfig,
    TrainerConfig,
)

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS: dict[type[GroupConfig], str] = {
    ModelConfig: "models",
    LayerConfig: "layers",
    LossConfig: "losses",
    TrainerConfig: "trainers",
    DataConfig: "data",
    EvaluationConfig: "evaluation",
}
"""Where the kinds of each base live, under newllm/."""

_SCHEMA_IMPORTS = ("__future__", "collections", "dataclasses", "math", "pathlib", "typing", "newllm.config")


def schema_of(base: type[GroupConfig], kind: str) -> type[GroupConfig] | None:
    """Return the schema class of a kind, or None where no file or no schema of that kind exists.

    A module that is already imported gives its own class; any other is read, not run.
    """
    name = f"newllm.{FOLDERS[base]}.{kind}"
    if name in sys.modules:
        return _last_of(base, vars(sys.modules[name]), name)
    if not kind.isidentifier() or not _file_of(name).is_file():
        return None
    return _last_of(base, _namespace(name), name)


def import_schema(base: type[GroupConfig], kind: str) -> type[GroupConfig]:
    """Return the schema class of a kind out of its imported module, with all that the module imports."""
    importlib.import_module(f"newllm.{FOLDERS[base]}.{kind}")
    schema = schema_of(base, kind)
    assert schema is not None, f"newllm.{FOLDERS[base]}.{kind} lost its schema on import"
    return schema


def kinds_of(base: type[GroupConfig]) -> list[str]:
    """Return the sorted kinds that have a schema."""
    files = (PACKAGE / FOLDERS[base]).glob("*.py")
    return sorted(file.stem for file in files if schema_of(base, file.stem) is not None)


def _file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _last_of(base: type[GroupConfig], namespace: dict[str, Any], module: str) -> type[GroupConfig] | None:
    own = [value for value in namespace.values() if isinstance(value, type) and value.__module__ == module]
    schemas = [value for value in own if issubclass(value, base) and value.__name__.endswith("Config")]
    return schemas[-1] if schemas else None


@cache
def _namespace(module: str) -> dict[str, Any]:
    """Return what the statements of the module that a schema may use define, each of them run alone."""
    path = _file_of(module)
    namespace: dict[str, Any] = {"__name__": module}
    for statement in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if isinstance(statement, ast.ImportFrom) and _is_sibling(statement):
            sibling = _namespace(str(statement.module))
            namespace |= {a.asname or a.name: sibling[a.name] for a in statement.names if a.name in sibling}
        elif _is_part_of_schema(statement, namespace):
            _run(statement, namespace, path)
    return namespace


def _is_sibling(statement: ast.ImportFrom) -> bool:
    """Whether the statement imports a schema that stands beside other code of ours."""
    is_ours = (statement.module or "").startswith("newllm.") and not str(statement.module).startswith("newllm.config")
    return is_ours and any(alias.name.endswith("Config") for alias in statement.names)


def _is_part_of_schema(statement: ast.stmt, namespace: dict[str, Any]) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return (statement.module or "").startswith(_SCHEMA_IMPORTS) and statement.module != "__future__"
    if isinstance(statement, ast.Import):
        return all(alias.name.startswith(_SCHEMA_IMPORTS) for alias in statement.names)
    if isinstance(statement, ast.ClassDef):
        is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in statement.decorator_list)
        return is_dataclass and statement.name.endswith("Config")
    return isinstance(statement, ast.Assign) and _is_plain_constant(statement, namespace)


def _is_plain_constant(statement: ast.Assign, namespace: dict[str, Any]) -> bool:
    """Whether the assignment calls nothing and names only what is known: a choice of words shared by two fields."""
    nodes = list(ast.walk(statement.value))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    known = all(name in namespace or hasattr(builtins, name) for name in names)
    return known and not any(isinstance(node, ast.Call) for node in nodes)


def _run(statement: ast.stmt, namespace: dict[str, Any], path: Path) -> None:
    for node in ast.walk(statement):  # types of methods may name what only the running module imports
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    code = compile(ast.Module([statement], []), str(path), "exec", dont_inherit=True)
    try:
        exec(code, namespace)
    except NameError as error:
        raise TypeError(
            f"{path}: the schema in line {statement.lineno} uses {error.name!r}, known only once the module runs. "
            f"Allowed: names from {', '.join(_SCHEMA_IMPORTS[1:])}. Move the value out of the schema."
        ) from error
