"""Where a run lies: names of run folders, and which of them goes on when a run is resumed."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from newllm.config.compose import from_hydra, read_config
from newllm.config.overrides import parse
from newllm.config.problems import ConfigError, shown
from newllm.config.schema import TrainConfig
from newllm.config.typed import DECIDING, RUN_INDEPENDENT, config_hash, flat, is_run_independent, plain

OF_ONE_SESSION = ("resume", "check", "profile", "stop_at_step")
"""Keys that a resumed run does not take over from the session before."""

FIRST_PHASE = "phase1"
"""Folder, inside a run's own, of the run that it makes first and builds on; few procedures have one."""


def run_folder(config: TrainConfig, now: datetime) -> Path:
    """Return the folder of a single run: the one it resumes, or one that does not exist yet.

    A cost estimate leaves nothing behind and gets a folder of its own outside.
    """
    if config.check:
        return Path(tempfile.gettempdir()) / "newllm_check"
    if config.resume is not None:
        return Path(config.resume)
    name = f"{now:%Y-%m-%d_%H-%M-%S}_{config_hash(config)}"
    folder, copy = Path(config.output_dir) / config.name / name, 2
    while folder.exists():  # two runs of one configuration in one second
        folder, copy = folder.with_name(f"{name}_{copy}"), copy + 1
    return folder


def override_hash(overrides: Sequence[str]) -> str:
    """Return 8 hex digits that name a job of a sweep: the same overrides in any order, but for what may differ."""
    deciding = sorted(text for text in overrides if not is_run_independent(text.partition("=")[0]))
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:8]


def not_writable(key: str, folder: str | Path) -> list[str]:
    """Return a sentence where nothing can be left in the folder: it cannot be made, or not be written to."""
    where = Path(folder)
    try:
        while not where.exists():
            where = where.parent
        tempfile.TemporaryFile(dir=where).close()
    except OSError as error:
        reason = f"cannot be written to ({where}: {error.strerror})"
        return [f"{key}={folder}: {reason}. Allowed: a folder that takes files. Make it writable, or name another."]
    return []


def can_resume(folder: Path) -> bool:
    """Whether the folder holds a run that was interrupted after a checkpoint, its own or of the run that it makes first."""
    parts = (folder, folder / FIRST_PHASE)
    is_begun = any((part / "checkpoints" / "last.ckpt").is_file() for part in parts)
    return is_begun and not (folder / "DONE").exists()


def latest_unfinished(config: TrainConfig) -> Path | None:
    """Return the newest run folder of exactly this configuration that can be resumed, or None."""
    runs = sorted((Path(config.output_dir) / config.name).glob(f"*_{config_hash(config)}*"), reverse=True)
    return next((folder for folder in runs if can_resume(folder)), None)


def overrides_of(folder: Path) -> list[str]:
    """Return the overrides a run was started with, without those of one session.

    Raises:
        ConfigError: the folder holds no run that can go on.
    """
    where, advice = f"resume={folder}", "Allowed: a folder train.py printed in its last line, or auto."
    if not (folder / "run.json").is_file():
        raise ConfigError([f"{where}: there is no run (no run.json). {advice} Name another folder."])
    if (folder / "DONE").exists():
        raise ConfigError([f"{where}: is finished. Allowed: a run without DONE. Start a new one to train longer."])
    if not can_resume(folder):
        raise ConfigError([f"{where}: has no checkpoints/last.ckpt. {advice} Start the run again without resume."])
    try:
        overrides = json.loads((folder / "run.json").read_text(encoding="utf-8"))["overrides"]
        return [text for text in overrides if parse(text).key_or_group not in OF_ONE_SESSION]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{where}: its run.json is damaged ({error}). {advice} Name another folder."]) from error


def differences(folder: Path, config: TrainConfig) -> list[str]:
    """Return a sentence for each key that decides the result and is not as the run in the folder has it."""
    try:
        before = flat(plain(read_config(folder / "config.yaml")))
    except ConfigError as error:
        return error.problems
    now = flat(plain(config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and not is_run_independent(key)]
    return [
        f"{key}={shown(now.get(key))}: the run in {folder} has {shown(before.get(key))}. "
        f"Allowed to differ when resuming: {', '.join(RUN_INDEPENDENT)}, but for {', '.join(DECIDING)}. "
        "Leave it out, or start a new run."
        for key in changed
    ]


def _resolve_run_folder(*, _root_: DictConfig) -> str:
    return str(run_folder(from_hydra(_root_, "train"), datetime.now()))


def _resolve_override_hash(*, _root_: DictConfig) -> str:
    return override_hash(list(_root_.hydra.overrides.task))


def register_resolvers() -> None:
    """Teach conf/train.yaml's `${run_folder:}` and `${override_hash:}` to Hydra, in every process that composes it."""
    OmegaConf.register_new_resolver("run_folder", _resolve_run_folder, replace=True)
    OmegaConf.register_new_resolver("override_hash", _resolve_override_hash, replace=True)


register_resolvers()
