"""Runs a list of measurements on a run folder: everything is rebuilt from the folder alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from newllm.config.command_line import refuse
from newllm.config.library import options
from newllm.config.problems import told
from newllm.config.schema import EvaluateConfig, EvaluationConfig
from newllm.config.typed import real_config
from newllm.evaluation.material import Material
from newllm.hardware import check_devices
from newllm.host_memory import keep_freed_memory
from newllm.json_text import to_json
from newllm.load import LoadedRun, load_run, newest_step
from newllm.models.base import LanguageModel
from newllm.run_lock import in_turn
from newllm.whole_file import write_whole

OF_THE_RUN = ("best", "validation")  # what evaluation.json is of: reports compare runs by it
REPRODUCED = ("val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy")
SHOWN_ENTRIES = 8  # of a list on the terminal


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a finished run, print the table and write the results into its folder.

    Args:
        config: which run, checkpoint, split and measurements.
    Returns:
        What was measured, as `run_suite` tells.
    Raises:
        SystemExit: 2 if nothing is to be measured, or the folder, its checkpoint or a measurement's options are refused.
    """
    try:
        config = real_config(config)
        if not config.evaluation:
            raise ValueError(
                f"evaluation=[]: measures nothing. Allowed: one or more of {', '.join(options('evaluation'))}. Name what to measure."
            )
        check_devices(config.runtime)
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
        refuse(told(error).splitlines())
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
    """Return what every measurement found, and write it to the file of these weights and this split.

    evaluation.json is of the best weights on validation text; of others it is evaluation_<checkpoint>_<split>.json. What the file
    holds of other measurements of the same weights stays there; of weights of another step it is kept in a file of that step.

    Args:
        run: the run, loaded from its folder.
        evaluations: options of each measurement, by name; none of them only put aside what is of weights of another step.
        split: text to measure on.
        batch_size: blocks; None takes the run's own, with which its logged numbers come out again to the last digit.
        device: where the model runs.
    Returns:
        `step`, `checkpoint`, `split` and `precision` that were measured, every measurement by name, `made_with`: the options of each,
        and `reproduced`: the run's logged numbers beside those of perplexity.
    """
    precision = run.config.runtime.precision
    of = {"step": run.step, "checkpoint": run.checkpoint, "split": split, "precision": precision}
    path = run.folder / _file_name(of)
    if not evaluations:
        with in_turn(run.folder / "config.yaml"):
            _measured_before(path, of)
        return {}
    run.model.to("cuda" if device == "gpu" else device)
    material = Material.of(run, split=split, batch_size=batch_size)
    measured: dict[str, Any] = {}
    with computing_in(precision, run.model), torch.no_grad():
        for name, chosen in evaluations.items():
            measure = importlib.import_module(f"newllm.evaluation.{chosen.kind}").measure
            measured[name] = measure(material, chosen)
    if split == "validation" and "perplexity" in measured:
        measured["reproduced"] = _reproduced(run, measured["perplexity"])
    given = {"batch_size": batch_size or run.config.data.eval_batch_size, "device": device}
    made_with = {name: {**dataclasses.asdict(chosen), **given} for name, chosen in evaluations.items()}
    # Read only now, and by no two at once: what another process measured meanwhile stays.
    with in_turn(run.folder / "config.yaml"):
        if newest_step(run) != run.step:
            path = _aside(path, run.step)
            print(f"{path}: holds what was measured: {run.checkpoint}.ckpt is of another step by now", file=sys.stderr)
        earlier = _measured_before(path, of)
        kept = {**earlier, **of, **measured, "made_with": {**earlier.get("made_with", {}), **made_with}}
        write_whole(path, to_json(kept, indent=2))
    return {**of, **measured, "made_with": made_with}


def _file_name(of: Mapping[str, Any]) -> str:
    measured = (of["checkpoint"], of["split"])
    return "evaluation.json" if measured == OF_THE_RUN else f"evaluation_{'_'.join(measured)}.json"


def _measured_before(path: Path, of: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the same weights on the same split; a file of anything else makes room under another name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    if {name: found.get(name) for name in of} == of and "made_with" in found:
        return found
    aside = _aside(path, found.get("step", "unknown"))
    path.replace(aside)
    print(f"{aside}: holds what was measured before, of other weights than these of step {of['step']}", file=sys.stderr)
    return {}


def _aside(path: Path, step: Any) -> Path:
    return path.with_stem(f"{path.stem}_of_step_{step}")


def computing_in(precision: str, model: LanguageModel) -> AbstractContextManager:
    """Return the context in which a model computes as in a run of this precision."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    device = next(model.parameters()).device.type
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def table(results: Mapping[str, Any]) -> str:
    """Return the results as lines of name and value for the terminal; the options they were made with stand in the file."""
    lines = []
    for name, value in _leaves({name: value for name, value in results.items() if name != "made_with"}):
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
