"""From plain containers to typed configurations and back; the hash that names a configuration."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from newllm.config.fields import MAX_DEPTH, allowed, choices, convert
from newllm.config.kinds import FOLDERS, import_schema, kinds_of, schema_of
from newllm.config.problems import Problem, listed, shown, with_closest
from newllm.config.schema import GroupConfig, LayerConfig, LayersConfig, TrainConfig

RUN_INDEPENDENT = (
    "runtime",
    "logger",
    "callbacks",
    "resume",
    "check",
    "profile",
    "stop_at_step",
    "output_dir",
    "data.num_workers",
    "data.cache_dir",
)
"""Keys and groups that may differ when a run is resumed: they decide where and how it runs, not what it computes."""
DECIDING = ("runtime.precision",)
"""Keys of these groups that do decide what is computed."""


OPTIONAL_GROUPS = ("experiment", "sweep", "debug")
"""Groups of which none need be chosen; their options set keys of the other groups."""

NO_STACK = "no stack"
"""Depth of a model without num_layers: it is not made of the layers group, whose options it leaves unused."""


@dataclass(frozen=True)
class Unresolved:
    """Stands in the tree for a value that could not be resolved; the reason is reported elsewhere.

    Attributes:
        text: what was written.
    """

    text: str

    def __str__(self) -> str:
        return self.text


Find = Callable[[type[GroupConfig], str], type[GroupConfig] | None]


def build(tree: Mapping[str, Any], root: type, *, find: Find = schema_of) -> tuple[Any, list[Problem]]:
    """Return the typed configuration, or None and what is wrong with the tree.

    Args:
        tree: plain containers, interpolations resolved.
        root: TrainConfig or EvaluateConfig.
        find: gives the schema class of a kind.
    """
    problems: list[Problem] = []
    config = _node(tree, root, "", _Reading(problems, find, _depth(tree)))
    if problems:
        return None, problems
    if isinstance(config, TrainConfig) and hasattr(config.model, "num_layers"):
        config = replace(config, model=replace(config.model, num_layers=len(config.layers.stack)))  # type: ignore[call-arg]
    return config, []


def real_config(config: Any) -> Any:
    """Return the same configuration with every schema class out of its imported module; imports torch.

    Until a kind's module is imported its class was read out of its source: equal in content, but not the class
    that isinstance and pickle know.
    """
    real, problems = build(plain(config), type(config), find=import_schema)
    assert not problems, problems
    return real


def plain(config: Any) -> Any:
    """Return the configuration in dicts, lists and scalars, as YAML and JSON hold it."""
    if isinstance(config, LayersConfig):
        parameters = {key: value for kind in config.kinds.values() for key, value in plain(kind).items()}
        parameters.pop("kind", None)
        return {"stack": list(config.stack), **parameters}
    if is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def config_hash(config: TrainConfig) -> str:
    """Return 8 hex digits that two configurations share only if they compute the same."""
    deciding = {
        key: value for key, value in flat(plain(config)).items() if not is_run_independent(key) and key != "name"
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def is_run_independent(key: str) -> bool:
    """Whether the dotted key, or the group it stands in, does not decide what is computed."""
    return key not in DECIDING and any(key == name or key.startswith(f"{name}.") for name in RUN_INDEPENDENT)


class _Reading:
    """What the walk down the tree carries: where problems go, how kinds are found, how deep a stack with rest is."""

    def __init__(self, problems: list[Problem], find: Find, depth: Any) -> None:
        self.problems, self.find, self.depth = problems, find, depth

    def refuse(self, key: str, value: Any, sentence: str) -> None:
        self.problems.append(Problem(key, f"{key}={shown(value)}", sentence))

    def miss(self, key: str, hint: Any) -> None:
        self.problems.append(Problem(key, key, f"is missing. Allowed: {allowed(hint)}. Give it a value."))


def _depth(tree: Mapping[str, Any]) -> Any:
    """Layers that a stack with `rest` is filled up to; NO_STACK where the model is not made of a stack."""
    model = tree.get("model")
    if isinstance(model, Mapping) and "kind" in model and "num_layers" not in model:
        return NO_STACK
    return model.get("num_layers") if isinstance(model, Mapping) else None


def _node(tree: Any, schema: type, key: str, reading: _Reading) -> Any:
    if not isinstance(tree, Mapping):
        return reading.refuse(key, tree, f"is not a group of keys. Allowed: {_names(schema)}. {_instead_of_one(key)}")
    hints, prefix = get_type_hints(schema, include_extras=True), f"{key}." if key else ""
    names, before = [field.name for field in fields(schema)], len(reading.problems)
    for name in tree:
        if not key and name in OPTIONAL_GROUPS:
            advice = f'Allowed: "# @package _global_" as its first line. Begin conf/{name}/<option>.yaml with it.'
            reading.refuse(str(name), tree[name], f"its file does not say that its keys are those of the run. {advice}")
        elif name not in names:
            advice = with_closest(f"Allowed: {listed(names)}.", str(name), names)
            reading.refuse(f"{prefix}{name}", tree[name], f"is not a key here. {advice}")
    values = {}
    for name in names:
        if name in tree:
            values[name] = _value(tree[name], hints[name], f"{prefix}{name}", reading)
        else:
            reading.miss(f"{prefix}{name}", hints[name])
    return schema(**values) if len(reading.problems) == before else None


def _instead_of_one(key: str) -> str:
    """Return what to do where a single value stands in the place of a group."""
    if "." in key:
        return "Give one of them."
    return f"Choose an option: {key}=<option> on the command line, `- override /{key}: <option>` in the defaults of a file."


def _value(value: Any, hint: Any, key: str, reading: _Reading) -> Any:
    if isinstance(value, Unresolved):
        return None
    if get_origin(hint) is dict and get_args(hint)[1] in FOLDERS:
        base = get_args(hint)[1]
        return {name: _of_kind(entry, base, f"{key}.{name}", reading) for name, entry in (value or {}).items()}
    if hint is LayersConfig:
        return _layers(value, key, reading)
    if hint in FOLDERS:
        return _of_kind(value, hint, key, reading)
    if isinstance(hint, type) and issubclass(hint, GroupConfig):
        return _node(value, hint, key, reading)
    try:
        return convert(value, hint)
    except ValueError as error:
        advice = f"Allowed: {allowed(hint)}."
        if isinstance(value, str):
            advice = with_closest(advice, value, choices(hint))
        return reading.refuse(key, value, f"{error}. {advice}")


def _of_kind(tree: Any, base: type[GroupConfig], key: str, reading: _Reading) -> Any:
    kind = tree.get("kind") if isinstance(tree, Mapping) else None
    schema = reading.find(base, kind) if isinstance(kind, str) else None
    if schema is not None:
        return _node(tree, schema, key, reading)
    kinds = kinds_of(base)
    if not isinstance(tree, Mapping):
        advice = f"Allowed: a group with a kind ({listed(kinds)}). {_instead_of_one(key)}"
        return reading.refuse(key, tree, f"is not a group of keys. {advice}")
    if kind is None:
        reading.problems.append(
            Problem(f"{key}.kind", f"{key}.kind", f"is missing. Allowed: {listed(kinds)}. Give it a value.")
        )
        return None
    advice = with_closest(f"Allowed: {listed(kinds)}.", str(kind), kinds)
    return reading.refuse(f"{key}.kind", kind, f"{_no_schema(base, kind)}. {advice}")


def _no_schema(base: type[GroupConfig], kind: Any) -> str:
    return f"there is no newllm/{FOLDERS[base]}/{kind}.py with a schema, a dataclass called ...Config that derives from {base.__name__}"


def _layers(tree: Any, key: str, reading: _Reading) -> LayersConfig | None:
    if reading.depth is NO_STACK:
        return LayersConfig(stack=(), kinds={})
    stack = tree.get("stack") if isinstance(tree, Mapping) else None
    kinds = kinds_of(LayerConfig)
    try:
        expanded = _expand(stack, kinds, reading.depth)
    except ValueError as error:
        reading.refuse(f"{key}.stack", stack, str(error))
        return None
    before, layers = len(reading.problems), {}
    known = {field.name for kind in kinds for field in fields(_schema(schema_of, kind))} | {"stack"}
    for name in tree:
        if name not in known:
            advice = with_closest(f"Allowed: {listed(known)}.", str(name), known)
            reading.refuse(f"{key}.{name}", tree[name], f"is a parameter of no kind of layer. {advice}")
    for kind in dict.fromkeys(expanded):
        schema = _schema(reading.find, kind)
        own = {field.name for field in fields(schema)} - {"kind"}
        layers[kind] = _node({"kind": kind} | {n: tree[n] for n in tree if n in own}, schema, key, reading)
    return LayersConfig(stack=expanded, kinds=layers) if len(reading.problems) == before else None


def _schema(find: Find, kind: str) -> type[GroupConfig]:
    schema = find(LayerConfig, kind)
    assert schema is not None, f"kinds_of names the layer {kind}, which has no schema"
    return schema


def _expand(stack: Any, kinds: list[str], depth: Any) -> tuple[str, ...]:
    """Return one kind per layer, from the bottom; the words after the value of an error sentence otherwise."""
    form = f"Allowed: a list of {listed(kinds)}, each alone or as {{kind: number}}, one of them as {{kind: rest}}."
    if not isinstance(stack, list | tuple) or not stack:
        raise ValueError(f"is not a list of layers. {form} Write for example [infini,{{pythia: rest}}].")
    counted: list[tuple[str, Any]] = []
    for entry in stack:
        counted += [*entry.items()] if isinstance(entry, Mapping) else [(entry, 1)]
    for kind, count in counted:
        if kind not in kinds:
            raise ValueError(
                with_closest(
                    f"{kind} is not a kind of layer: {_no_schema(LayerConfig, kind)}. {form}", str(kind), kinds
                )
            )
        if count != "rest" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{kind} cannot be repeated {shown(count)} times. {form} Give an integer of at least 1.")
    fixed = sum(count for _, count in counted if count != "rest")
    if fixed > MAX_DEPTH:
        raise ValueError(f"is {fixed} layers high. Allowed: at most {MAX_DEPTH}. Take fewer layers.")
    rests = sum(count == "rest" for _, count in counted)
    if rests > 1:
        raise ValueError(f"rest stands there {rests} times. {form} Give all but one a number.")
    if depth is not None and (not isinstance(depth, int) or depth > MAX_DEPTH):
        depth = fixed + 1  # refused as model.num_layers already
    if rests and (depth is None or depth <= fixed):
        advice = "Raise model.num_layers or leave the rest out."
        raise ValueError(
            f"leaves no layer of model.num_layers={shown(depth)} to the rest. Allowed: a rest of at least 1. {advice}"
        )
    return tuple(kind for kind, count in counted for _ in range(depth - fixed if count == "rest" else count))


def _names(schema: type) -> str:
    return listed(field.name for field in fields(schema))
