"""What a run leaves behind: config.yaml, run.json, metrics.jsonl, DONE or FAILED. Imports no torch."""

import json
import math
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from newllm.environment import git_state, package_versions, peak_memory
from newllm.json_text import finite, to_json
from newllm.whole_file import remove_leftovers, write_whole

Metrics = dict[str, float]

HIGHER_IS_BETTER = frozenset(
    (
        *("val/accuracy", "speed/tokens_per_second", "speed/mfu"),
        *("context/effective_rank", "context/effective_rank_validation"),
        *("context/converged_share", "context/converged_share_validation"),
        *("lag/gradient_cosine", "trm/gradient_cosine", "trm/halting_accuracy"),
    )
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunRecord:
    """Writes the record of one run; every file is replaced whole, so a reader never sees half of one.

    A run that was interrupted goes on in the same folder: each stretch is one entry of `sessions` in run.json, and the
    first config.yaml and start time stay. A session that was killed lasted until its last checkpoint, as far as is known.

    Args:
        folder: the run folder; created if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, Any] = {}

    def begin(
        self, *, config: Mapping[str, Any], seed: int, config_hash: str, overrides: Sequence[str], **facts: Any
    ) -> None:
        """Write config.yaml and run.json with status `running`; call it before the first step.

        Args:
            config: the resolved configuration in plain containers.
            seed: the run's seed.
            config_hash: hash of the keys that decide the result.
            overrides: what the user typed.
            facts: further entries of run.json, for instance data_fingerprint, parameters, state_bytes (per stream),
                flops_per_token, guards.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        earlier: dict[str, Any] = {"started": _now()}
        if (self.folder / "run.json").exists():
            earlier = _read_facts(self.folder)
        sessions = [_closed(session) for session in earlier.get("sessions", [])]
        code = {"git": git_state(Path(__file__).parent), "packages": package_versions()}
        sessions.append(
            {"started": _now(), "status": "running", "overrides": list(overrides), "host": socket.gethostname(), **code}
        )
        if not (self.folder / "config.yaml").exists():
            write_whole(self.folder / "config.yaml", yaml.safe_dump(finite(config), sort_keys=False))
        own = {"seed": seed, "config_hash": config_hash, **code, **facts}
        if "overrides" not in earlier:
            own["overrides"] = list(overrides)
        self.facts = {**earlier, "status": "running", "exit_reason": None, **own, "sessions": sessions}
        self._write()
        for marker in ("DONE", "FAILED"):
            (self.folder / marker).unlink(missing_ok=True)

    def update(self, **facts: Any) -> None:
        """Add facts that are known only later to run.json."""
        self.facts = {**self.facts, **facts}
        self._write()

    def has_lasted(self, wall_seconds: float) -> None:
        """Note how long the session has lasted so far: what is known of it should it be killed."""
        sessions = self.facts["sessions"]
        self.update(sessions=[*sessions[:-1], {**sessions[-1], "wall_seconds": wall_seconds}])

    def finish(
        self,
        *,
        status: str,
        exit_reason: str,
        tokens: int,
        tokens_per_second: float,
        wall_seconds: float,
        metrics: Mapping[str, float],
        best_metrics: Mapping[str, float],
    ) -> None:
        """Complete run.json; leave DONE where the status is `finished`.

        Args:
            status: `finished`, or `stopped` where the run can be resumed.
            exit_reason: why it ended, in words.
            tokens: tokens seen by the run, all sessions together.
            tokens_per_second: mean training speed of this session.
            wall_seconds: duration of this session; run.json adds up the sessions, and holds null where a killed one never said.
            metrics: last value of every metric.
            best_metrics: best value of every metric.
        """
        if status not in ("finished", "stopped"):
            raise ValueError(
                f"status={status!r}: is no way to finish. Allowed: 'finished', 'stopped'. For errors call fail()."
            )
        self._close(status, exit_reason, wall_seconds)
        summary = {"metrics": dict(metrics), "best_metrics": dict(best_metrics)}
        self.update(tokens=tokens, tokens_per_second=tokens_per_second, **summary)
        if status == "finished":
            write_whole(self.folder / "DONE", f"{self.facts['finished']} {exit_reason}\n")

    def fail(self, error: BaseException, *, wall_seconds: float) -> None:
        """Record that the run ended with an error, and leave its traceback in FAILED."""
        self._close("failed", f"{type(error).__name__}: {error}", wall_seconds)
        self._write()
        write_whole(self.folder / "FAILED", "".join(traceback.format_exception(error)))

    def _close(self, status: str, exit_reason: str, wall_seconds: float) -> None:
        end = {"status": status, "exit_reason": exit_reason, "finished": _now(), "wall_seconds": wall_seconds}
        sessions = self.facts.get("sessions", [{}])
        sessions = [*sessions[:-1], {**sessions[-1], **end}]
        durations = [session.get("wall_seconds") for session in sessions]
        total = None if None in durations else sum(durations)
        memory = {f"peak_{where}_bytes": size for where, size in peak_memory().items()}
        self.facts = {**self.facts, **end, "wall_seconds": total, **memory, "sessions": sessions}

    def _write(self) -> None:
        write_whole(self.folder / "run.json", to_json(self.facts, indent=2))


def _closed(session: dict[str, Any]) -> dict[str, Any]:
    """A session still called running when the next one begins was killed."""
    return {**session, "status": "killed"} if session.get("status") == "running" else session


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: the run folder.
        facts: contents of run.json.
        config: contents of config.yaml.
    """

    folder: Path
    facts: dict[str, Any]
    config: dict[str, Any]


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing. Allowed: a folder that train.py wrote. Check the path.") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}). Allowed: the JSON that train.py wrote. Train again."
        ) from error
    if not isinstance(facts, dict):
        raise ValueError(
            f"{path}: holds {type(facts).__name__}, not an object. Allowed: what train.py wrote. Train again."
        )
    return facts


def read_run(folder: str | Path) -> Run:
    """Return a run's facts and configuration.

    Raises:
        ValueError: run.json or config.yaml is missing or cannot be read.
    """
    folder = Path(folder)
    facts = _read_facts(folder)
    path = folder / "config.yaml"
    try:
        # The C loader is ten times faster; PyYAML ships without it on some platforms.
        config = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Allowed: what train.py wrote. Train again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no mapping. Allowed: what train.py wrote. Train again.")
    return Run(folder, facts, config)


def append_metrics(folder: Path, line: Mapping[str, float]) -> None:
    """Add one log step to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(to_json(line))


def keep_metrics(folder: Path, *, up_to_step: int) -> None:
    """Drop the log steps after `up_to_step`, which a resumed run makes again."""
    if (folder / "metrics.jsonl").exists():
        kept = [line for line in read_metrics(folder) if line["step"] <= up_to_step]
        write_whole(folder / "metrics.jsonl", "".join(map(to_json, kept)))


def read_metrics(folder: str | Path) -> list[Metrics]:
    """Return the log steps of metrics.jsonl, in order; NaN where a value was not finite.

    A last line that a killed process tore is left out; damage elsewhere is an error.

    Raises:
        ValueError: a line before the last is no JSON object of numbers with a step.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    read: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read.append(_log_step(json.loads(line)))
        except ValueError as error:
            if number == len(lines):  # not ended by a newline: torn
                continue
            raise ValueError(
                f"{path}:{number}: is damaged ({error}). Allowed: one JSON object a line, of numbers, with its step. Delete the line."
            ) from error
    return read


def _log_step(found: Any) -> Metrics:
    if not isinstance(found, dict):
        raise ValueError(f"is {type(found).__name__}, not an object")
    if not isinstance(found.get("step"), int):
        raise ValueError(f"step={found['step']!r} is no count" if "step" in found else "has no step")
    strange = [name for name, value in found.items() if not isinstance(value, int | float | None)]
    if strange:
        raise ValueError(f"{strange[0]}={found[strange[0]]!r} is no number")
    return {name: math.nan if value is None else value for name, value in found.items()}


def last_and_best(lines: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Return the last and the best value of every metric; NaN counts only where there is nothing else.

    Best is the highest for accuracies, ranks, shares of converged items, cosines and speeds, the lowest for all others.
    """
    last: Metrics = {}
    best: Metrics = {}
    for line in lines:
        for name, value in line.items():
            if name in ("step", "tokens"):
                continue
            last[name] = value
            sign = -1.0 if name in HIGHER_IS_BETTER else 1.0
            if math.isnan(best.get(name, math.nan)) or sign * value < sign * best[name]:
                best[name] = value
    return last, best
