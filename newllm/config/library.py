"""What conf/ offers: groups, their options and one line about each; and its composition by Hydra."""

import re
from functools import cache
from pathlib import Path

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

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


def load(root: str, overrides: list[str], *, is_sweep: bool = False) -> DictConfig:
    """Return the untyped, unresolved configuration that Hydra composes, with Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException: the overrides cannot be composed.
    """
    mode = RunMode.MULTIRUN if is_sweep else RunMode.RUN
    return _loader(conf_folder()).load_configuration(root, overrides, run_mode=mode)


@cache
def _loader(folder: Path) -> ConfigLoaderImpl:
    if version.getbase() is None:  # the entry points set it; a notebook does not
        version.setbase("1.3")
    # The compose API of Hydra holds one global state, which belongs to the entry point; its loader is a value.
    return ConfigLoaderImpl(create_config_search_path(str(folder)))
