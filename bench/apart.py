"""A peer in a process of its own, with the host's memory as it comes there: nothing that newllm sets for a process reaches it.

On a GPU, whose memory is another, it stays in this process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench import measure
from bench.peers import put_on_path

HOW = (
    "in a process of its own on a CPU, as its users start it; ours is set, as train.py sets its own, to keep the memory that a step "
    "frees for the next one"
)


@contextmanager
def apart(build: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[Callable[[], object]]:
    """Give a call that has the other process make one call of what `build` returns there, and waits for it.

    Args:
        build: a function of a module of bench, called in the other process, on the same device and with as many threads.
        arguments: its arguments, to be pickled.
    Raises:
        RuntimeError: by the call, what went wrong in the other process.
    """
    if measure.DEVICE != "cpu":
        yield build(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    about = measure.DEVICE, torch.get_num_threads(), build.__module__, build.__name__, arguments
    process = context.Process(target=_serve, args=(there, *about), daemon=True)
    process.start()
    there.close()  # a process that dies is then the end of what can be read here

    def call() -> None:
        here.send("go")
        try:
            problem = here.recv()
        except EOFError:
            problem = "it ended"
        if problem is not None:
            raise RuntimeError(f"{build.__name__} in a process of its own: {problem}")

    try:
        yield call
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, device: str, threads: int, module: str, name: str, arguments: tuple) -> None:
    """Build, then make one call whenever asked; answer None, or what went wrong."""
    measure.DEVICE = device
    torch.set_num_threads(threads)
    put_on_path()
    call: Callable[[], object] | None = None
    while True:
        connection.recv()
        try:
            if call is None:
                call = getattr(import_module(module), name)(*arguments)
            call()
        except Exception as error:  # whatever it is, it is told where the measurement is made
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send(None)
