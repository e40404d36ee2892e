"""One process writes a run folder at a time, and measurements of it are added one after another."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; it is free again when the block ends or the process dies, however it dies.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{folder}: another process is writing this run. Allowed: one at a time. Wait for it, stop it, or choose another name."
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold a file that exists, once those that hold it have let go; it is free again as `only_writer` says."""
    with open(file, "r+b") as held:  # NFS gives the lock to those that may write
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
