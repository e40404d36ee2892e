"""The jobs of a sweep, known before the first of them starts."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from newllm.config.compose import examine
from newllm.config.library import hydra_setting, options
from newllm.config.named_files import missing_files
from newllm.config.overrides import judge, parse, quoted
from newllm.config.typed import is_run_independent

MAX_COMBINATIONS = 200
"""Jobs that are checked one by one; of a larger sweep every value is checked, but not every combination."""


EXTRAS = {
    "hydra/launcher=joblib": ("joblib", "hydra_joblib_launcher"),
    "hydra/launcher=ray": ("ray", "hydra_ray_launcher"),
    "hydra/launcher=submitit_local": ("slurm", "hydra_submitit_launcher"),
    "hydra/launcher=submitit_slurm": ("slurm", "hydra_submitit_launcher"),
    "hydra/sweeper=optuna": ("optuna", "hydra_optuna_sweeper"),
}
"""Extras of this package that bring a launcher or sweeper, and the plugin in each."""


def missing_extras(overrides: list[str]) -> list[str]:
    """Return a sentence for each launcher or sweeper that is not installed."""
    return [
        f"{text}: is not installed. Allowed here: {text.partition('=')[0]}=basic. "
        f'Install the extra: pip install "newllm[{EXTRAS[text][0]}]".'
        for text in overrides
        if text in EXTRAS and not _has_plugin(EXTRAS[text][1])
    ]


def is_sweep(overrides: list[str], root: str) -> bool:
    """Whether the overrides choose a sweep by themselves (an option that sets hydra.mode), without -m."""
    return str(_hydra_setting(overrides, root, "mode")).endswith("MULTIRUN")


def examine_jobs(overrides: list[str], root: str) -> list[str]:
    """Return every mistake in any job of a sweep, with the jobs that have it."""
    try:
        choices = _choices(overrides, root)
    except ValueError as error:
        return [str(error)]
    sharing = [
        _with_one_folder(key, texts) for key, texts in choices.items() if len(texts) > 1 and _names_no_folder(key)
    ]
    if sharing:
        return sharing
    jobs = list(_jobs(choices))
    found: dict[str, list[list[str]]] = {}
    for job in jobs:
        config, problems = examine(job, root)
        for problem in problems if config is None else [*problems, *missing_files(config)]:
            found.setdefault(problem, []).append(job)
    varying = {text for texts in choices.values() if len(texts) > 1 for text in texts}
    merged = _merged(found, varying)
    return [_where(problem, concerned, len(jobs), varying) for problem, concerned in merged.items()]


def _names_no_folder(key: str) -> bool:
    """Whether jobs that differ in this key alone lie in one folder: it decides nothing of what they come to."""
    return is_run_independent(key) and key != "output_dir"


def _with_one_folder(key: str, texts: list[str]) -> str:
    values = ",".join(text.partition("=")[2] for text in texts)
    return (
        f"{key}={values}: decides where and how a job runs, not what it computes: the jobs would share one folder, and only the first run. "
        "Allowed in a sweep: keys that decide the result. Run it once for each value, with a name of its own."
    )


def for_the_jobs(overrides: list[str], root: str) -> list[str]:
    """Return the overrides of a sweep as Hydra takes them: a key that only swept options bring is set in the jobs alone.

    Hydra composes the command line once without what varies before it makes the jobs, and knows no such key there.
    """
    plain = [text for text in overrides if not parse(text).is_sweep_override()]
    known = judge(plain, root).good
    unknown = [text for text in plain if text not in known]
    if not unknown:
        return overrides
    keys = (text.partition("=") for text in unknown)
    parameters = ",".join(f"{key}:{quoted(value)}" for key, _, value in keys)
    return [*(text for text in overrides if text not in unknown), f"++hydra.sweeper.params={{{parameters}}}"]


def _has_plugin(name: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{name}") is not None


def _merged(found: dict[str, list[list[str]]], varying: set[str]) -> dict[str, list[list[str]]]:
    """Return the problems with their jobs, those as one that say the same of several values of a key."""
    together: dict[tuple[str, str], list[str]] = {}
    for problem in found:
        text = next((text for text in varying if problem.startswith(f"{text}: ")), "")
        key = text.partition("=")[0]
        sentence = problem.removeprefix(f"{text}: ") if text else problem
        together.setdefault((key, sentence), []).append(text.partition("=")[2])
    merged = {}
    for (key, sentence), values in together.items():
        problems = [f"{key}={value}: {sentence}" if key else sentence for value in values]
        jobs = dict.fromkeys(tuple(job) for problem in problems for job in found[problem])
        merged[f"{key}={','.join(values)}: {sentence}" if key else sentence] = [list(job) for job in jobs]
    return merged


def _where(problem: str, concerned: list[list[str]], total: int, varying: set[str]) -> str:
    if len(concerned) == total:
        return problem
    example = " ".join(text for text in concerned[0] if text in varying)
    return f"{problem} (in {len(concerned)} of {total} jobs checked, for example {example})"


def _choices(overrides: list[str], root: str) -> dict[str, list[str]]:
    """Return for each key the overrides it takes in turn; what the command line says replaces what a sweep option says."""
    parameters = _hydra_setting(overrides, root, "sweeper.params") or {}
    choices: dict[str, list[str]] = {}
    for text in [*(f"{key}={value}" for key, value in parameters.items()), *overrides]:
        try:
            override = parse(text)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
        choices[override.get_key_element()] = _values(override, text)
    return choices


def _values(override: Override, text: str) -> list[str]:
    if not override.is_sweep_override():
        return [text]
    key, value = override.get_key_element(), override.value()
    if override.is_interval_sweep():
        return [f"{key}={value.start}", f"{key}={value.end}"]  # type: ignore[union-attr]
    if type(value).__name__ == "Glob":
        names = value.filter(options(override.key_or_group))  # type: ignore[union-attr]
    else:
        names = list(override.sweep_iterator(transformer=Transformer.str))
    if not names:
        raise ValueError(f"{text}: gives no value at all. Allowed: at least one. Correct the range or pattern.")
    return [f"{key}={name}" for name in names]


def _jobs(choices: dict[str, list[str]]) -> Iterator[list[str]]:
    if prod(len(texts) for texts in choices.values()) <= MAX_COMBINATIONS:
        yield from map(list, product(*choices.values()))
        return
    first = {key: texts[0] for key, texts in choices.items()}
    yield list(first.values())
    for key, texts in choices.items():
        for text in texts[1:]:
            yield list({**first, key: text}.values())


def _hydra_setting(overrides: list[str], root: str, key: str) -> Any:
    """Return one of Hydra's settings as the overrides leave it; None where they cannot be composed."""
    try:
        plain = [text for text in overrides if not parse(text).is_sweep_override()]
        return hydra_setting(root, plain, key)
    except (HydraException, OmegaConfBaseException, ValueError):
        return None
