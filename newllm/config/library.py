"""What conf/ offers: groups, their options and one line about each; and its composition by Hydra."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from newllm.config.problems import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """Return conf/: beside the package in a checkout, inside it where newllm is installed from a wheel."""
    for folder in (PACKAGE.parent / "conf", PACKAGE / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"conf: there is no train.yaml in {PACKAGE.parent / 'conf'} nor {PACKAGE / 'conf'}. "
        "Allowed: a checkout, or newllm installed with its conf folder. Install newllm again."
    )


@cache
def chosen_by_default(root: str) -> dict[str, str | list[str] | None]:
    """Return the groups of a root configuration, in order, and the option each has unless the user says otherwise."""
    defaults = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{root}.yaml").defaults)
    assert isinstance(defaults, list), f"conf/{root}.yaml has no defaults list"
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    return {group: option for entry in entries for group, option in entry.items() if not group.startswith("override ")}


@cache
def options(group: str) -> list[str]:
    """Return the sorted options of a group: one file each; folders inside hold what several options share."""
    return sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))


@cache
def description(group: str, option: str) -> str:
    """Return what the option's file says about it in its first line of comment."""
    text = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    lines = re.findall(r"^# (?!@package)(.*)$", text, flags=re.MULTILINE)
    return lines[0] if lines else ""


@contextmanager
def damage_named() -> Iterator[None]:
    """Say which files of conf/ are no YAML, where and why, when one of them cannot be read.

    Raises:
        ConfigError: one sentence for each damaged file.
    """
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        damaged = [problem for path in sorted(conf_folder().rglob("*.yaml")) for problem in _damage(path)]
        if not damaged:
            raise
        raise ConfigError(damaged) from None


def _damage(path: Path) -> list[str]:
    name = f"conf/{path.relative_to(conf_folder()).as_posix()}"
    try:
        OmegaConf.load(path)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        reason = f"line {line}: holds a byte that is not UTF-8"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        reason = f"{where}cannot be read as YAML ({error.problem})"
    except (yaml.YAMLError, OSError) as error:
        reason = f"cannot be read ({' '.join(str(error).split())})"
    else:
        return []
    return [f"{name}: {reason}. Allowed: YAML in UTF-8, one key a line, indented by spaces. Correct the file."]


def load(root: str, overrides: list[str]) -> DictConfig:
    """Return the untyped, unresolved configuration that Hydra composes, without Hydra's own node.

    Hydra first composes the chosen options, then sets the given keys; the first, slow half is kept for the next call.

    Raises:
        HydraException, OmegaConfBaseException, ValueError: the overrides cannot be composed.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    is_value = {text: _sets_key(override, root) for text, override in zip(overrides, parsed, strict=True)}
    config = deepcopy(_chosen(conf_folder(), root, tuple(text for text in overrides if not is_value[text]))[0])
    values = [override for text, override in zip(overrides, parsed, strict=True) if is_value[text]]
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


def hydra_setting(root: str, overrides: list[str], key: str) -> Any:
    """Return one of Hydra's own settings under the same overrides, in plain containers."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = tuple(text for text, override in zip(overrides, parsed, strict=True) if not _sets_key(override, root))
    value = OmegaConf.select(_chosen(conf_folder(), root, choices)[1], key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _sets_key(override: Override, root: str) -> bool:
    is_choice = override.key_or_group in chosen_by_default(root) or override.package is not None
    return not is_choice and not override.is_hydra_override()


@cache
def _chosen(folder: Path, root: str, choices: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
    """Return what the chosen options give, and Hydra's own node."""
    config = _loader(folder).load_configuration(root, list(choices), run_mode=RunMode.RUN)
    hydra = config.hydra
    with open_dict(config):
        del config["hydra"]
        if any(text.startswith("evaluation=") for text in choices):
            for name in left_out(config.evaluation):
                del config.evaluation[name]
    return config, hydra


def left_out(evaluation: Mapping[Any, Any]) -> list[str]:
    """Return the measurements that an experiment sets keys of and the user, choosing others, did not take."""
    return [name for name in options("evaluation") if name in evaluation and "kind" not in evaluation[name]]


@cache
def _loader(folder: Path) -> ConfigLoaderImpl:
    if version.getbase() is None:  # the entry points set it; a notebook does not
        version.setbase("1.3")
    # The compose API of Hydra holds one global state, which belongs to the entry point; its loader is a value.
    return ConfigLoaderImpl(create_config_search_path(str(folder)))
