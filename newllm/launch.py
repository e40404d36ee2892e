"""Starts the processes of a run, or finds those that torchrun or SLURM started, and joins them before anything is built.

On one machine the process of the command line is rank 0 and starts the others (`python -m newllm.launch`), which get its
configuration, checked and resolved. Under torchrun and SLURM every process has a command line of its own: they must say the same.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from newllm import ranks
from newllm.config.command_line import refuse
from newllm.config.problems import ConfigError, shown, told
from newllm.config.schema import RuntimeConfig, TrainConfig
from newllm.config.typed import build, flat, plain

T = TypeVar("T")

RANK = "NEWLLM_RANK"
"""Environment variable of a process that rank 0 has started."""
GRACE_SECONDS = 20.0  # in which a rank notices by itself that another has ended: its own error says more


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
        rank: from 0, over all machines.
        local_rank: from 0, on its machine: the number of its device.
        node: number of its machine.
        world_size: processes of all machines.
        starts_others: whether it is this process that starts the others.
    """

    rank: int
    local_rank: int
    node: int
    world_size: int
    starts_others: bool


def place_of(runtime: RuntimeConfig, environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun, SLURM or rank 0 gave this process; the only one, or rank 0, where none did.

    Raises:
        ValueError: another number of processes was started on this machine than runtime.devices.
    """
    here = runtime.devices
    if RANK in environment:
        number = int(environment[RANK])
        return Place(number, number, 0, here, starts_others=False)
    if "TORCHELASTIC_RUN_ID" in environment:
        names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, local_rank, node, world_size, started = (int(environment[name]) for name in names)
        _check_number(here, started, "torchrun", "--nproc-per-node")
        return Place(rank, local_rank, node, world_size, starts_others=False)
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1 and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        rank, local_rank, node = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
        _check_number(here, tasks // int(environment.get("SLURM_NNODES", "1")), "SLURM", "--ntasks-per-node")
        return Place(rank, local_rank, node, tasks, starts_others=False)
    return Place(0, 0, 0, here, starts_others=here > 1)


def _check_number(devices: int, started: int, starter: str, option: str) -> None:
    if started != devices:
        raise ValueError(
            f"runtime.devices={devices}: {starter} started {started} processes on this machine. Allowed: {started}. "
            f"Set runtime.devices={started}, or {option}={devices}."
        )


def _check_sharing(config: TrainConfig, processes: int) -> None:
    """Check what the configuration cannot say by itself: it counts the devices of one machine."""
    if processes > 1 and not config.trainer.shares_batches:
        raise ValueError(
            f"trainer={config.trainer.kind}: runs in one process, {processes} were started. Allowed: one. "
            "Start train.py on one machine, with runtime.devices=1."
        )
    if processes > config.data.batch_size:
        raise ValueError(
            f"data.batch_size={config.data.batch_size}: cannot be shared out among the {processes} processes of all machines. "
            f"Allowed: {processes} or more. Raise data.batch_size, or start fewer."
        )


@contextmanager
def joined(config: TrainConfig, folder: Path, overrides: Sequence[str]) -> Iterator[Path]:
    """Join the processes of the run for the block, and yield the folder of rank 0: the run's only one.

    Raises:
        ValueError: another number of processes was started than the configuration says or the run can use, or they cannot meet.
        SystemExit: 2 where the ranks were given different configurations; rank 0 tells the difference.
    """
    place = place_of(config.runtime, os.environ)
    _check_sharing(config, place.world_size)
    if place.world_size == 1:
        yield folder
        return
    before = dict(os.environ)
    os.environ.update(_addresses(place))
    others = _start_others(config, folder, overrides) if place.starts_others else None
    try:
        _join(place, config.runtime)
        if place.rank > 0:
            _be_quiet()
        _check_agreement(config)
        yield ranks.said_by_all(folder)[0]
    except BaseException:
        if others is not None:
            others.give_up()
        raise
    else:
        if others is not None:
            others.wait()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def agreed(work: Callable[[], T]) -> T:
    """Return what the work gives, once it has succeeded on every rank.

    Raises:
        ValueError: it was refused on a rank; on rank 0. The others leave with exit code 2, and nothing to say.
    """
    result, problem = None, None
    try:
        result = work()
    except (ValueError, TypeError) as error:
        problem = told(error)
    problems = [said for said in ranks.said_by_all(problem) if said is not None]
    if not problems:
        return result  # type: ignore[return-value]  # None only where the work gives it
    if ranks.rank() > 0:
        raise SystemExit(2)
    raise ConfigError(problems[:1])


def _addresses(place: Place) -> dict[str, str]:
    """Return what Lightning and torch read of a process's place."""
    found = {"LOCAL_RANK": str(place.local_rank), "NODE_RANK": str(place.node)}
    if place.starts_others:
        return found | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    if "SLURM_NTASKS" in os.environ and "MASTER_ADDR" not in os.environ:
        slurm = SLURMEnvironment()
        return found | {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
    return found


def _join(place: Place, runtime: RuntimeConfig) -> None:
    backend = "gloo"
    if runtime.accelerator == "gpu":
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"  # what lies in RAM, the lagged cache for one, travels without the GPU
    # What is logged has been summed over the ranks; the buffers' option has no other name in all versions of torch.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
    try:
        torch.distributed.init_process_group(backend, rank=place.rank, world_size=place.world_size)
    except torch.distributed.DistError as error:
        where = ", ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"{where}: rank {place.rank} cannot meet the others there ({str(error).strip().splitlines()[0]}). Allowed: the "
            "machine of rank 0 and a port that no other program uses. Name another port, or start again."
        ) from error


def _be_quiet() -> None:
    """Leave the telling to rank 0; errors of this process are still told."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _check_agreement(config: TrainConfig) -> None:
    """End with exit code 2 where a rank's configuration is not that of rank 0."""
    said = ranks.said_by_all(flat(plain(config)))
    problems = []
    for number, other in enumerate(said):
        for key in sorted(said[0] | other):
            if said[0].get(key) != other.get(key):
                given = (
                    f"{key}={shown(other.get(key))}: rank {number} was given it, rank 0 has {shown(said[0].get(key))}."
                )
                problems.append(f"{given} Allowed: one configuration for all ranks. Start all with the same command.")
    if problems and ranks.rank() == 0:
        refuse(problems)
    if problems:
        raise SystemExit(2)


class _Others:
    """The processes that rank 0 has started, watched: where one ends, this one cannot go on."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._is_over = False
        for number, process in enumerate(processes, start=1):
            threading.Thread(target=self._watch, args=(number, process), daemon=True).start()

    def wait(self) -> None:
        """Wait until all have ended."""
        self._is_over = True
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()

    def give_up(self) -> None:
        """End those that would wait for this process."""
        self._is_over = True
        deadline = time.monotonic() + 1
        for number, process in enumerate(self._processes, start=1):
            try:
                code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                continue
            if code < 0:  # it had no time to say anything, and torch tells of a lost connection
                _tell_end(number, code)

    def _watch(self, number: int, process: subprocess.Popen[str]) -> None:
        code = process.wait()
        if code == 0:
            return
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self._is_over:
                return
            time.sleep(0.1)
        _tell_end(number, code)
        # The main thread may wait inside a collective operation, where no exception reaches it.
        os._exit(code if code in (2, 130, 143) else 1)


def _tell_end(number: int, code: int) -> None:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    with suppress(OSError):  # nobody reads any more: no reason to stay
        os.write(2, f"rank {number} {how}: the run cannot go on without it\n".encode())


def _start_others(config: TrainConfig, folder: Path, overrides: Sequence[str]) -> _Others:
    message = json.dumps({"config": plain(config), "folder": str(folder), "overrides": list(overrides)})
    processes = []
    for number in range(1, config.runtime.devices):
        environment = {**os.environ, RANK: str(number), "LOCAL_RANK": str(number)}
        command = [sys.executable, "-m", "newllm.launch"]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None, "asked for"
        process.stdin.write(message + "\n")
        process.stdin.flush()  # and left open: its end tells that this process has ended
        processes.append(process)
    return _Others(processes)


def _end_with_first() -> NoReturn:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Be a rank that rank 0 has started."""
    message: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_first, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 tells when to stop: training listens for itself
    config, problems = build(message["config"], TrainConfig)
    assert not problems, problems
    from newllm.run import run_training

    run_training(config, Path(message["folder"]), message["overrides"])


if __name__ == "__main__":
    main()
