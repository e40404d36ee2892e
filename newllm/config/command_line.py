"""The door of train.py and evaluate.py: every mistake of a command line is answered here, before torch is imported."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from newllm.config.compose import examine, from_hydra, read_config
from newllm.config.help_text import help_text
from newllm.config.library import damage_named, load
from newllm.config.named_files import missing_files
from newllm.config.overrides import parse, quoted, readable, with_quotes
from newllm.config.problems import ConfigError, listed
from newllm.config.run_folder import can_resume, differences, latest_unfinished, not_writable, overrides_of
from newllm.config.schema import EvaluateConfig, TrainConfig
from newllm.config.sweeps import examine_jobs, for_the_jobs, is_sweep, missing_extras


@dataclass(frozen=True)
class Job:
    """One run that Hydra asks for.

    Attributes:
        config: TrainConfig or EvaluateConfig.
        folder: run folder, relative where it lies below the current folder.
        overrides: what the user typed for this run.
    """

    config: Any
    folder: Path
    overrides: list[str]


def check_command_line(arguments: Sequence[str], root: str) -> list[str]:
    """Return the arguments for Hydra, checked: what they start can be run as far as the configuration decides.

    A resumed run gets the overrides it was started with. `--help` is answered here.

    Args:
        arguments: sys.argv without the program.
        root: "train" or "evaluate".
    Raises:
        SystemExit: 2 after one block on stderr with every mistake, 0 after `--help`.
    """
    options = _options(arguments)
    overrides = [with_quotes(text) for text in options.overrides]
    if not options.help and (options.hydra_help or options.info is not None or options.shell_completion):
        return list(arguments)
    try:
        with damage_named():
            if options.help:
                _show(help_text(root, [text for text in overrides if not examine([text], root)[1]]))
                raise SystemExit(0)
            overrides = _checked(overrides, root, options.multirun)
    except ConfigError as error:
        refuse(error.problems)
    return [*_flags(options), *overrides]


def sweep_output(arguments: Sequence[str], root: str) -> Path | None:
    """Return the output folder of the sweep that checked arguments start; None where they start no sweep."""
    options = _options(arguments)
    overrides = list(options.overrides)
    only_shows = options.hydra_help or options.info is not None or options.shell_completion or options.cfg is not None
    if only_shows or not (options.multirun or is_sweep(overrides, root)):
        return None
    return _output_dir(overrides)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(problems: Sequence[str]) -> NoReturn:
    """End with exit code 2 and one block on stderr that lists the problems."""
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"newllm: nothing was started, {number} found:", *(f"  - {problem}" for problem in problems)]
    print("\n".join(lines), file=sys.stderr)
    raise SystemExit(2)


def job_of(untyped: DictConfig, root: str) -> Job:
    """Return the run that Hydra's task function is called for.

    Args:
        untyped: what Hydra composed out of a checked command line.
        root: "train" or "evaluate".
    """
    hydra = HydraConfig.get()
    try:
        config = from_hydra(untyped, root)
    except ConfigError as error:
        refuse(error.problems)
    folder = Path(hydra.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    if root == "train" and config.resume == "auto":  # a job of a sweep: it has one folder, whenever it starts
        config = replace(config, resume=str(folder) if can_resume(folder) else None)
    return Job(config, folder, list(hydra.overrides.task))


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove what Hydra made for a run that left nothing in it: one that was refused, or a cost estimate."""
    try:
        yield
    finally:
        for path in (folder, folder.parent):
            with suppress(OSError):  # not empty, or not there: there is a run
                path.rmdir()


def _options(arguments: Sequence[str]) -> Namespace:
    parser: ArgumentParser = get_args_parser()

    def error(message: str) -> NoReturn:
        refuse([f"{' '.join(arguments)}: {message}. Allowed: key=value, group=option and the flags of --hydra-help."])

    parser.error = error  # type: ignore[method-assign]  # its own prints a usage that knows no key of ours
    options = parser.parse_intermixed_args(list(arguments))
    for name in ("config_name", "config_path", "config_dir", "experimental_rerun"):
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            refuse([f"{flag}: there is one configuration. Allowed: files in conf/. Add an option or experiment there."])
    return options


def _flags(options: Namespace) -> list[str]:
    flags = ["--" + name for name in ("multirun", "run", "resolve") if getattr(options, name)]
    for name in ("cfg", "package"):
        flags += ["--" + name, getattr(options, name)] if getattr(options, name) is not None else []
    return flags


def _checked(overrides: list[str], root: str, multirun: bool) -> list[str]:
    """Return the overrides as Hydra shall have them; raise ConfigError with all that is wrong."""
    if multirun or is_sweep(overrides, root):
        return _checked_sweep(overrides, root)
    resume = _value(overrides, "resume") if root == "train" else None
    if resume == "auto":
        return _continued_or_new(overrides)
    if resume is not None:
        return _continued(overrides, Path(resume))
    config = _examined(overrides, root)
    if root == "evaluate":
        _check_evaluated_run(config)
    return readable(overrides, root)


def _checked_sweep(overrides: list[str], root: str) -> list[str]:
    if root == "evaluate":
        raise ConfigError(
            ["-m: one run is evaluated at a time. Allowed: evaluate.py without -m. Call it for each run."]
        )
    if _value(overrides, "resume") not in (None, "auto"):
        advice = "Allowed in a sweep: resume=auto, each job in its own folder. Resume a single run without -m."
        raise ConfigError([f"resume={_value(overrides, 'resume')}: is one folder for many jobs. {advice}"])
    problems = missing_extras(overrides) or examine_jobs(overrides, root)
    problems += not_writable("output_dir", _output_dir(overrides))
    if problems:
        raise ConfigError(problems)
    return for_the_jobs(readable(overrides, root), root)


def _continued_or_new(overrides: list[str]) -> list[str]:
    overrides = _without(overrides, ["resume"])
    config = _examined(overrides, "train")
    folder = latest_unfinished(config)
    return readable(overrides if folder is None else [*overrides, f"resume={quoted(str(folder))}"], "train")


def _continued(overrides: list[str], folder: Path) -> list[str]:
    """Return the overrides of the run in the folder, followed by the given ones."""
    given = _without(overrides, ["resume"])
    saved = _without(overrides_of(folder), [_key(text) for text in given])
    overrides = [*saved, *given, f"resume={quoted(str(folder))}"]
    config = _examined(overrides, "train")
    changed = differences(folder, config)
    if changed:
        raise ConfigError(changed)
    return readable(overrides, "train")


def _check_evaluated_run(config: EvaluateConfig) -> None:
    """Refuse a folder without a run that can be evaluated, and measurements that do not fit its model."""
    folder, advice = Path(config.run), "Allowed: a folder train.py printed in its last line. Name another folder."
    if not (folder / "run.json").is_file():
        raise ConfigError([f"run={folder}: there is no run (no run.json). {advice}"])
    found = sorted(file.stem for file in (folder / "checkpoints").glob("*.ckpt"))
    problems = []
    if not found:
        problems.append(f"run={folder}: has no checkpoint yet. {advice.rstrip('.')}, or train this one further.")
    elif config.checkpoint not in found:
        problems.append(
            f"checkpoint={config.checkpoint}: run={folder} has no checkpoints/{config.checkpoint}.ckpt. "
            f"Allowed: {listed(found)}. Take one of these, or train longer than trainer.checkpoint_every_steps."
        )
    trained = replace(read_config(folder / "config.yaml"), evaluation=config.evaluation)
    problems += [problem for evaluation in config.evaluation.values() for problem in evaluation.check(trained)]
    if problems:
        raise ConfigError(problems)


def _output_dir(overrides: Sequence[str]) -> Path:
    return Path(_value(overrides, "output_dir") or load("train", []).output_dir)


def _no_place(config: TrainConfig | EvaluateConfig) -> list[str]:
    """Return a sentence where what the run leaves has no place."""
    if isinstance(config, EvaluateConfig):
        return not_writable("run", config.run)
    if config.check:
        return []
    if config.resume is not None:
        return not_writable("resume", config.resume)
    return not_writable("output_dir", config.output_dir)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _without(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [text for text in overrides if _key(text) not in keys]


def _value(overrides: Sequence[str], key: str) -> Any:
    """Return what the overrides set a key to, the last of them winning; None where they do not, or not readably."""
    texts = [text for text in overrides if _key(text) == key]
    try:
        return parse(texts[-1]).value() if texts else None
    except ValueError:
        return None


def _examined(overrides: list[str], root: str) -> Any:
    config, problems = examine(overrides, root)
    if config is not None:
        problems += _no_place(config)
    if isinstance(config, TrainConfig):
        problems += missing_files(config)
    if problems:
        raise ConfigError(problems)
    return config
