"""From overrides to a typed configuration that is known to be possible, or to all that is wrong with it."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from newllm.config.compatibility import check_model, check_run
from newllm.config.kinds import kinds_of, schema_of
from newllm.config.library import chosen_by_default, conf_folder, damage_named, left_out, load, options
from newllm.config.overrides import Judgement, judge, key_of, quoted, readable
from newllm.config.problems import ConfigError, Problem, listed, shown, with_closest
from newllm.config.schema import EvaluateConfig, LayerConfig, LayersConfig, TrainConfig
from newllm.config.typed import Unresolved, build, real_config

ROOTS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}


def compose(overrides: list[str], root: str = "train") -> TrainConfig:
    """Return the configuration that the command line `python <root>.py <overrides>` runs with.

    Raises:
        ConfigError: the overrides name what does not exist, give what is not allowed, or do not go together; its
            `problems` lists every mistake.
    """
    config, problems = examine(overrides, root)
    if problems:
        raise ConfigError(problems)
    return config


def compose_model(name: str, *, size: str, keys: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with the named model, every class real; the groups that train it are left at their defaults.

    Args:
        name: option of conf/model.
        size: option of conf/size.
        keys: values of keys of the model or of its layers, by the key's last part.
    Raises:
        ConfigError: a name or key that does not exist, or a value that is not allowed.
    """
    choice = [f"model={name}", f"size={size}"]
    tree = load("train", choice) if name in options("model") and size in options("size") else None
    values, problems = [], []
    for key, value in keys.items():
        places = [group for group in ("model", "layers") if tree is not None and key in tree[group]]
        if places:
            values.append(f"{places[0]}.{key}={_written(value)}")
        elif tree is not None:
            known = [str(known) for group in ("model", "layers") for known in tree[group]]
            problems.append(with_closest(f"{key}={shown(value)}: is not a key. Allowed: {listed(known)}.", key, known))
    config, others = examine(choice + values, "train", pairs=False)
    if problems or others:
        raise ConfigError([*problems, *others])
    return cast(TrainConfig, real_config(config))


def read_config(path: Path) -> TrainConfig:
    """Return the configuration that a run saved as config.yaml.

    Raises:
        ConfigError: the file is not there, is damaged, or does not fit this version of newllm.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(
            [f"{path}: cannot be read ({reason}). Allowed: the config.yaml of a run. Name another run."]
        ) from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(
            [f"{path}: is empty or no run's configuration. Allowed: the config.yaml of a run. Name another run."]
        )
    config, problems = build(tree, TrainConfig)
    if problems:
        where = f"{path} was not written by this version of newllm:"
        raise ConfigError([f"{where} {problem.text}" for problem in problems])
    return cast(TrainConfig, config)


def from_hydra(untyped: DictConfig, root: str) -> Any:
    """Return the typed configuration of what Hydra composed out of a checked command line.

    Raises:
        ConfigError: something has changed since the check.
    """
    keys = [str(key) for key in untyped if key != "hydra"]
    tree: Any = OmegaConf.to_container(OmegaConf.masked_copy(untyped, keys), resolve=True)
    for name in left_out(tree["evaluation"]):
        del tree["evaluation"][name]
    config, problems = build(tree, ROOTS[root])
    if problems:
        raise ConfigError([problem.text for problem in problems])
    return config


def examine(overrides: list[str], root: str, *, pairs: bool = True) -> tuple[Any, list[str]]:
    """Return the typed configuration, or None and every mistake that can be found.

    Args:
        pairs: check what only training needs: that model, trainer, loss and data go together.
    Raises:
        ConfigError: a file of conf/ is damaged.
    """
    try:
        with damage_named():
            overrides = readable(overrides, root)
            config, judgement, problems = _without_mistakes(overrides, root)
    except (HydraException, OmegaConfBaseException) as error:
        return None, [_in_our_words(error, overrides)]
    if config is not None and root == "train":
        given = {text: key_of(text) for text in judgement.good}
        if not judgement.unclear:
            problems += _unused_parameters(config, given) + _depth_given_twice(config, given)
        problems += check_run(config, given.values()) if pairs else check_model(config)
    return (None if problems else config), list(dict.fromkeys(problems))


def _without_mistakes(overrides: list[str], root: str) -> tuple[Any, Judgement, list[str]]:
    """Return what the overrides give without the mistaken ones, which overrides those are not, and what is wrong."""
    if all(_is_plain(text) for text in overrides):  # the common case costs one composition
        judgement = Judgement(groups=overrides)
        try:
            tree, unresolved, _ = _resolved(load(root, overrides))
            config, _ = build(tree, ROOTS[root])
        except (HydraException, OmegaConfBaseException, ValueError):
            config, unresolved = None, []
        if config is not None and not unresolved:
            return config, judgement, []
    judgement = judge(overrides, root)
    config, found = _leaving_out_mistakes(judgement, root)
    return config, judgement, [problem.text for problem in [*judgement.problems, *found]]


def _is_plain(text: str) -> bool:
    """Whether an override may go to Hydra unseen: its own checks know its keys and options."""
    key, _, value = text.partition("=")
    return key[:1].isalpha() and "@" not in key and not key.endswith(".kind") and not value.startswith("{")


def _leaving_out_mistakes(judgement: Judgement, root: str) -> tuple[Any, list[Problem]]:
    """Leave out overrides whose value is refused until the rest can be typed, so that the rest is looked at too."""
    problems: list[Problem] = []
    while True:
        tree, found, sources = _resolved(load(root, judgement.good))
        config, refused = build(tree, ROOTS[root])
        found = _without_consequences([*found, *refused], sources)
        culprits = {text for text, key in judgement.values.items() if any(_concerns(p.key, key) for p in found)}
        chosen = {text: key_of(text) for text in judgement.groups}
        problems += [_as_written(problem, judgement.values | chosen) for problem in found]
        if not found or not culprits:
            return (None if found else config), problems
        judgement.values = {text: key for text, key in judgement.values.items() if text not in culprits}


def _concerns(problem_key: str, key: str) -> bool:
    return problem_key == key or problem_key.startswith(f"{key}.") or key.startswith(f"{problem_key}.")


def _as_written(problem: Problem, values: Mapping[str, str]) -> Problem:
    """Return the problem with the override that caused it, letter by letter, where there is one."""
    texts = [text for text, key in values.items() if key == problem.key]
    return replace(problem, given=texts[-1]) if texts else problem


def _without_consequences(problems: list[Problem], sources: dict[str, str]) -> list[Problem]:
    """Drop problems of values that are only copied from a key, or out of a group, with a problem of its own."""
    keys = {problem.key for problem in problems}

    def is_copied(source: str) -> bool:
        return any(source == key or source.startswith(f"{key}.") for key in keys)

    return [problem for problem in problems if not is_copied(sources.get(problem.key, ""))]


def _resolved(config: DictConfig) -> tuple[dict[str, Any], list[Problem], dict[str, str]]:
    """Return plain containers, what cannot be resolved, and for each copied value the key it comes from."""
    problems: list[Problem] = []
    sources: dict[str, str] = {}

    def raw(node: DictConfig, name: str) -> str:
        tree: Any = OmegaConf.to_container(node, resolve=False)
        return shown(tree[name])

    def read(node: Any, key: str) -> Any:
        if isinstance(node, ListConfig):
            return [read(node[index], f"{key}.{index}") for index in range(len(node))]
        if not isinstance(node, DictConfig):
            return node
        names = [str(name) for name in node]
        return {name: entry(node, name, f"{key}.{name}" if key else name) for name in names}

    def entry(node: DictConfig, name: str, key: str) -> Any:
        if OmegaConf.is_interpolation(node, name):
            sources[key] = raw(node, name).removeprefix("${").removesuffix("}")
        try:
            return read(node[name], key)
        except MissingMandatoryValue:
            problems.append(Problem(key, key, f"is missing. Allowed: a value of its own. Write {key}=<value>."))
        except (InterpolationResolutionError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            advice = "Allowed: a value, or ${key} of another key. Write the value itself."
            problems.append(Problem(key, f"{key}={raw(node, name)}", f"cannot be resolved ({reason}). {advice}"))
        return Unresolved(raw(node, name))

    return read(config, ""), problems, sources


def _unused_parameters(config: TrainConfig, given: Mapping[str, str]) -> list[str]:
    """Return a sentence for each parameter of layers that the user set and no layer of the stack has."""
    layers: LayersConfig = config.layers
    used = {"layers", "layers.stack"} | {f"layers.{f.name}" for kind in layers.kinds.values() for f in fields(kind)}
    problems = []
    for text, key in given.items():
        if key.startswith("layers.") and key not in used:
            users = [kind for kind in kinds_of(LayerConfig) if key.removeprefix("layers.") in _keys_of(kind)]
            problems.append(
                f"{text}: no layer of the stack has it (layers.stack={shown(layers.stack)}). "
                f"Allowed: with layers of kind {listed(users)}. Choose such a stack or leave the key out."
            )
    return problems


def _depth_given_twice(config: TrainConfig, given: Mapping[str, str]) -> list[str]:
    """Return a sentence where the user asked for another number of layers than the model gets."""
    depth = len(config.layers.stack)
    last = {key: text for text, key in given.items()}  # of a key given twice the last counts
    asked = {
        text: key
        for key, text in last.items()
        if key in ("model.num_layers", "size.num_layers") and text.partition("=")[2] != str(depth)
    }
    if not asked:
        return []
    source = _resolved(load("train", list(given)))[2].get("model.num_layers")
    listed_twice = (
        f"the stack lists {depth} layers (layers.stack={shown(config.layers.stack)}). "
        f"Allowed: {depth}, or a stack with {{kind: rest}}. Leave one of the two out."
    )
    own_depth = (
        f"the depth of model {config.model.kind} does not come from the size. "
        "Allowed: model.num_layers=<layers>. Write that in its place."
    )
    return [
        f"{text}: {listed_twice if key in ('model.num_layers', source) else own_depth}" for text, key in asked.items()
    ]


def _keys_of(kind: str) -> list[str]:
    schema = schema_of(LayerConfig, kind)
    return [field.name for field in fields(schema)] if schema is not None else []


def _in_our_words(error: Exception, overrides: list[str]) -> str:
    """Return what Hydra itself refuses: its own settings, or what an option says under `defaults`."""
    reason = " ".join(str(error.__cause__ or error).split("Config search path")[0].split())
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", reason)
    if missing is not None and options(missing[1]):
        group, option = missing.groups()
        advice = with_closest(f"Allowed: {listed(options(group))}.", option, options(group))
        return f"{_file_with(option, overrides)}: {group}={option}: {option} is not an option of {group}. {advice}"
    unknown = re.search(r"In '([^']+)': Could not override '([^']+)'", reason)
    if unknown is not None:
        groups = [*chosen_by_default("train")]
        advice = with_closest(f"Allowed: {listed(groups)}.", unknown[2], groups)
        return f"conf/{unknown[1]}.yaml: override /{unknown[2]}: there is no such group. {advice}"
    return (
        f"{' '.join(_concerned(overrides, reason))}: Hydra cannot compose it ({reason.rstrip('.')}). "
        "Allowed: what --help lists, and what --hydra-help says of hydra.* settings. Leave out what is named."
    )


def _concerned(overrides: list[str], reason: str) -> list[str]:
    """Return the overrides of Hydra's settings that its reason names; all overrides where it names none."""
    own = [text for text in overrides if text.lstrip("+~").startswith("hydra")]
    keys = {text: re.split("[./]", text.partition("=")[0])[-1] for text in own}
    return [text for text, key in keys.items() if key in reason] or overrides


def _file_with(word: str, overrides: list[str]) -> str:
    """Return the file of the chosen option that says the word, or all overrides where none does."""
    names = [f"{text.replace('=', '/', 1)}.yaml" for text in overrides]
    files = [name for name in names if (conf_folder() / name).is_file()]
    found = [name for name in files if word in (conf_folder() / name).read_text(encoding="utf-8")]
    return f"conf/{found[0]}" if found else " ".join(overrides)


def _written(value: Any) -> str:
    """Return a Python value in the grammar of overrides."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(element) for element in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(element)}" for key, element in value.items()) + "}"
    return shown(value)
