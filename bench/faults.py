"""Runs that are killed (SIGKILL) at random moments and go on, beside the same runs left alone: every bit must be equal."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bench.measure import Found, NotWrittenError, table
from newllm.config.run_folder import can_resume
from newllm.jobs.process import start_fresh
from newllm.run_record import read_metrics, read_run

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
SEED = 0
KILLS_PER_RUN = 3  # then it may finish
STEPS = 60
TINY = [
    *("data=bible", "tokenizer=bytes", "data.block_length=32", "data.batch_size=4", "data.eval_batch_size=4"),
    *("size.dim=16", "size.num_layers=2", "size.num_heads=2", "size.mlp_dim=32", "layers.segment_length=16"),
    *(f"trainer.max_steps={STEPS}", "trainer.validate_every_steps=20", "trainer.checkpoint_every_steps=3"),
    *("trainer.log_every_steps=1", "schedule.warmup_steps=5", "runtime.num_threads=1", "data.max_unseen=1"),
    *("callbacks.sample_every_steps=null", "callbacks.lag_every_steps=null", "evaluation=[]", "logger=none"),
    *("guards.preflight=false", "data.max_train_blocks=100", "data.max_validation_blocks=8"),  # kills land in training
]
PROCEDURES = {
    "standard": ["model=infini", "trainer=standard"],
    "lct": ["model=infini", "trainer=lct"],
    "streaming": ["model=infini", "layers=all_infini", "trainer=streaming"],
}
KILLS = {"standard": 8, "lct": 6, "streaming": 6}
TOKENISING = [*TINY, "model=infini", "tokenizer=bpe", "tokenizer.vocab_size=1024", "check=true"]
CACHE_KILLS = 4


def _start(folder: Path, overrides: Sequence[str], *, cache: Path) -> BaseProcess:
    folder.mkdir(parents=True, exist_ok=True)
    resume = [f"resume='{folder}'"] if can_resume(folder) else []
    arguments = [*overrides, f"data.cache_dir={cache}", *resume, f"hydra.run.dir='{folder}'"]
    return start_fresh(SCRIPT, arguments, log=folder.with_suffix(".log"))


def _finish(folder: Path, overrides: Sequence[str], *, cache: Path) -> float:
    """Let a session run to its end; return its seconds."""
    started = time.monotonic()
    process = _start(folder, overrides, cache=cache)
    process.join()
    if process.exitcode != 0:
        said = folder.with_suffix(".log").read_text()[-2000:]
        raise NotWrittenError(f"faults: a session in {folder} ended with exit code {process.exitcode}:\n{said}")
    return time.monotonic() - started


def _kill(
    folder: Path, overrides: Sequence[str], delay: float, *, cache: Path, reached: Callable[[], bool] = lambda: True
) -> bool:
    """Start a session and kill it; return whether it was still running.

    Args:
        delay: seconds before the kill, from the moment that is waited for.
        reached: whether that moment has come; the start unless told.
    """
    process = _start(folder, overrides, cache=cache)
    while process.exitcode is None and not reached():
        time.sleep(0.002)
    process.join(delay)
    was_running = process.exitcode is None
    process.kill()
    process.join()
    return was_running


def _at_step(folder: Path, step: int) -> Callable[[], bool]:
    """Return whether the session that starts next has logged the step."""
    lines = folder / "metrics.jsonl"
    before = lines.stat().st_ino if lines.exists() else None

    def reached() -> bool:
        # A session that goes on replaces the file first: what an earlier one wrote does not count.
        return lines.exists() and lines.stat().st_ino != before and lines.read_bytes().count(b"\n") >= step

    return reached


def _building(cache: Path, after: int) -> Callable[[], bool]:
    """Return whether a cache is being written, `after` others being complete."""
    return lambda: any(cache.glob("*.tmp-*")) and len(list(cache.glob("*.lock"))) > after


def _check_whole(folder: Path) -> None:
    """Read all that a killed run has left under its final names."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)
    if (folder / "run.json").exists():
        read_run(folder)
        read_metrics(folder)


def _leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp" in path.name)


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places in which two checkpoints differ by any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(set(one) | set(other), key=str)
        return [text for name in names for text in _differences(one.get(name), other.get(name), f"{where}.{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [text for index, pair in pairs for text in _differences(*pair, f"{where}[{index}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]


def _compare(alone: Path, killed: Path) -> list[str]:
    """Return what differs between two finished runs: weights, moments, caches, carried state, every logged number."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "random_state", "lagged_cache", "stream")
    one, other = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (alone, killed))
    found = [text for part in parts for text in _differences(one.get(part), other.get(part), part)]
    lines = [
        [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in read_metrics(run)]
        for run in (alone, killed)
    ]
    found += [] if lines[0] == lines[1] else ["metrics.jsonl"]
    found += [] if (killed / "DONE").exists() else ["DONE"]
    files = [sorted(path.name for path in run.iterdir()) for run in (alone, killed)]
    return found + ([] if files[0] == files[1] else [f"files {set(files[0]) ^ set(files[1])}"])


def _procedure(name: str, kills: int, folder: Path, generator: random.Random) -> dict[str, Any]:
    overrides, cache = [*TINY, *PROCEDURES[name]], folder / "cache"
    alone = folder / f"{name}_alone"
    _finish(alone, overrides, cache=cache)  # the first session also waits for imports, and tokenises
    seconds = _finish(folder / f"{name}_timed", overrides, cache=cache)
    moments: list[int | None] = []
    differing: dict[str, list[str]] = {}
    leftovers: list[str] = []
    runs = 0
    while len(moments) < kills:
        run = folder / f"{name}_killed_{runs}"
        runs += 1
        begun = len(moments)
        while not (run / "DONE").exists() and len(moments) < min(kills, begun + KILLS_PER_RUN):
            # Starting and closing take longer than so few steps: three of four kills are to fall among the steps.
            reached = moments[-1] if len(moments) > begun and moments[-1] is not None else 0
            step = (
                generator.randint(reached + 1, STEPS - 1) if generator.random() < 0.75 and reached + 1 < STEPS else None
            )
            delay = generator.uniform(0.0, 0.05) if step is not None else generator.uniform(0.0, 0.9) * seconds
            chosen = {} if step is None else {"reached": _at_step(run, step)}
            if not _kill(run, overrides, delay, cache=cache, **chosen):
                break
            _check_whole(run)
            saved = run / "checkpoints" / "last.ckpt"
            moments.append(torch.load(saved, weights_only=True)["global_step"] if saved.exists() else None)
        if not (run / "DONE").exists():
            _finish(run, overrides, cache=cache)
        leftovers += _leftovers(run)
        found = _compare(alone, run)
        if found:
            differing[run.name] = found
        print(
            f"{name}: {len(moments)} of {kills} kills, last checkpoint at step {moments[begun:]}, differs in {found}",
            flush=True,
        )
    return {
        "kills": len(moments),
        "runs": runs,
        "session_seconds": seconds,
        "checkpoint_step_at_kill": moments,
        "differing": differing,
        "leftovers": leftovers,
    }


def _contents(cache: Path) -> dict[str, Any]:
    """Return what every file holds, but for how long it took to make."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"):
        found[str(path.relative_to(cache))] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name == "meta.json":
            content = json.loads(path.read_text())
            meta = {name: value for name, value in content["meta"].items() if name != "tokenize_seconds"}
            found[str(path.relative_to(cache))] = {"key": content["key"], "files": content["files"], "meta": meta}
    return found


def _caches(kills: int, folder: Path, generator: random.Random) -> dict[str, Any]:
    seconds = _finish(folder / "tokenised", TOKENISING, cache=folder / "cache_alone")
    done = 0
    cache, damaged = folder / "cache_killed", 0
    while done < kills:
        shutil.rmtree(cache, ignore_errors=True)
        moment = _building(cache, generator.choice((0, 1)))  # the tokenizer's cache, then that of the ids
        done += _kill(folder / "tokenised", TOKENISING, generator.uniform(0.0, 0.5), cache=cache, reached=moment)
        _finish(folder / "tokenised", TOKENISING, cache=cache)
        damaged += _contents(cache) != _contents(folder / "cache_alone")
        print(f"tokenising: {done} of {kills} kills, {damaged} caches differ", flush=True)
    return {"kills": done, "session_seconds": seconds, "differing": damaged, "leftovers": _leftovers(cache)}


def measure(name: str, *, quick: bool = False) -> dict[str, Any]:
    """Kill, go on and compare in one procedure, or in tokenising; its moments depend on no other's.

    Raises:
        NotWrittenError: a run could not go on.
    """
    generator = random.Random(f"{SEED} {name}")
    with tempfile.TemporaryDirectory() as where:
        if name == "tokenising":
            return _caches(1 if quick else CACHE_KILLS, Path(where), generator)
        return _procedure(name, 1 if quick else KILLS[name], Path(where), generator)


def run(quick: bool) -> Found:
    """Measure all, one after another.

    Raises:
        NotWrittenError: a run could not go on.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    return told({name: measure(name, quick=quick) for name in [*PROCEDURES, "tokenising"]})


def told(found: dict[str, dict[str, Any]]) -> Found:
    """Return what `measure` found."""
    total = sum(part["kills"] for part in found.values())
    rows = []
    for name, part in found.items():
        differing = len(part["differing"]) if name in PROCEDURES else part["differing"]
        rows.append([name, part["kills"], part.get("runs", part["kills"]), differing, len(part["leftovers"])])
    head = ["", "kills", "runs", "runs that differ from the one left alone", "temporary files left"]
    text = (
        f"{total} kills (SIGKILL), seed {SEED}: three of four within 50 ms after a step drawn uniformly, so among steps, checkpoints "
        f"and validations; the others at a moment drawn uniformly over a session, start and closing included. "
        f"Up to {KILLS_PER_RUN} in a run, each followed "
        "by `resume=<folder>`, or by a new start in the same folder where no checkpoint was written yet. Compared bit for bit: weights, "
        "moments, schedule, random state, lagged cache, carried memory, every line of metrics.jsonl but speeds; for tokenising every "
        "byte of the cache, killed within half a second after it was begun. After each kill every file under its final name was read."
    )
    return Found(f"{table(head, rows)}\n\n{text}", {"seed": SEED, **found})
