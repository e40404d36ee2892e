"""Runs a list of measurements on a run folder: everything is rebuilt from the folder alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from newllm.config.command_line import refuse
from newllm.config.schema import EvaluateConfig, EvaluationConfig
from newllm.config.typed import real_config
from newllm.evaluation.material import Material
from newllm.host_memory import keep_freed_memory
from newllm.load import LoadedRun, load_run
from newllm.models.base import LanguageModel
from newllm.whole_file import write_whole

OF_THE_RUN = ("best", "validation")  # what evaluation.json is of: reports compare runs by it
REPRODUCED = ("val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy")
SHOWN_ENTRIES = 8  # of a list on the terminal


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a finished run, print the table and write the results into its folder.

    Args:
        config: which run, checkpoint, split and measurements.
    Returns:
        What the file holds, as `run_suite` tells.
    Raises:
        SystemExit: 2 if the folder, its checkpoint or a measurement's options are refused.
    """
    try:
        config = real_config(config)
        run = load_run(config.run, config.checkpoint)
        # Sums over another number of threads differ in their last digits.
        num_threads = config.runtime.num_threads or run.config.runtime.num_threads
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if config.runtime.accelerator == "cpu":
            keep_freed_memory()
        evaluations = _with_prompt(config)
        for measurement in evaluations.values():
            problems = measurement.check(run.config)
            if problems:
                raise ValueError("\n".join(problems))
        results = run_suite(
            run, evaluations, split=config.split, batch_size=config.batch_size, device=config.runtime.accelerator
        )
    except (ValueError, TypeError) as error:
        refuse(str(error).splitlines())
    print(table(results))
    print(f"run: {config.run}")
    return results


def run_suite(
    run: LoadedRun,
    evaluations: Mapping[str, EvaluationConfig],
    *,
    split: Literal["validation", "test"] = "validation",
    batch_size: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return what every measurement found, and write it to a file of its own for each kind of weights and split.

    evaluation.json is of the best weights on validation text; of others it is evaluation_<checkpoint>_<split>.json.

    Args:
        run: the run, loaded from its folder.
        evaluations: options of each measurement, by name.
        split: text to measure on.
        batch_size: blocks; None takes the run's own, with which its logged numbers come out again to the last digit.
        device: where the model runs.
    """
    run.model.to("cuda" if device == "gpu" else device)
    precision = run.config.runtime.precision
    material = Material.of(run, split=split, batch_size=batch_size)
    results: dict[str, Any] = {
        "step": run.step,
        "checkpoint": run.checkpoint,
        "split": split,
        "precision": precision,
    }
    with computing_in(precision, run.model):
        for name, options in evaluations.items():
            measure = importlib.import_module(f"newllm.evaluation.{options.kind}").measure
            results[name] = measure(material, options)
    if split == "validation" and "perplexity" in results:
        results["reproduced"] = _reproduced(run, results["perplexity"])
    write_whole(run.folder / _file_name(results), json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    return results


def _file_name(results: Mapping[str, Any]) -> str:
    measured = (results["checkpoint"], results["split"])
    return "evaluation.json" if measured == OF_THE_RUN else f"evaluation_{'_'.join(measured)}.json"


def computing_in(precision: str, model: LanguageModel) -> AbstractContextManager:
    """Return the context in which a model computes as in a run of this precision."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    device = next(model.parameters()).device.type
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def table(results: Mapping[str, Any]) -> str:
    """Return the results as lines of name and value for the terminal."""
    lines = []
    for name, value in _leaves(results):
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        if isinstance(value, list) and len(value) > SHOWN_ENTRIES:
            shown = f"{len(value)} entries, see {_file_name(results)}"
        lines.append(f"{name:<44} {shown}")
    return "\n".join(lines)


def _with_prompt(config: EvaluateConfig) -> Mapping[str, EvaluationConfig]:
    """The measurements, that of generation with the prompt of the command line if there is one."""
    if config.prompt is None:
        return config.evaluation
    options = config.evaluation.get("generation")
    if options is None:
        raise ValueError(
            f"prompt={config.prompt}: is continued by none of the measurements. Allowed with it: evaluation=[generation]. "
            "Add generation to the list or leave prompt out."
        )
    if options.prompts_file is not None:  # type: ignore[attr-defined]  # the schema of evaluation=[generation]
        raise ValueError(
            f"prompt={config.prompt}: stands beside evaluation.generation.prompts_file. Allowed: one of the two. "
            "Leave one out."
        )
    changes: dict[str, Any] = {"prompt": config.prompt}
    return {**config.evaluation, "generation": dataclasses.replace(options, **changes)}


def _reproduced(run: LoadedRun, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own logged numbers at this checkpoint beside those measured now."""
    logged = {name: run.metrics[name] for name in REPRODUCED if name in run.metrics}
    return {
        name: {"logged": value, "measured": measured[name.removeprefix("val/")], "equal": value == measured[name[4:]]}
        for name, value in logged.items()
    }


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [
            leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(tree, list) and tree and isinstance(tree[0], Mapping):
        return [leaf for index, value in enumerate(tree) for leaf in _leaves(value, f"{prefix}[{index}]")]
    return [(prefix, tree)]


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
