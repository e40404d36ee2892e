"""A Python script in a fresh process that need not wait for torch: forked from a server that has imported it once."""

import fcntl
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ["newllm.jobs.deaf", "newllm.run"]
"""What the server imports before the first script, which listens to Ctrl-C again where it wants to."""
BUSY = 75
"""Exit code where another process is writing the log: EX_TEMPFAIL of sysexits.h."""


def run_fresh(script: Path, arguments: Sequence[str], *, log: Path | None) -> int:
    """Run a script as `python <script> <arguments>` would and return its exit code; minus the signal that killed it.

    The first call of a process starts a server that imports torch and lightning, the next ones fork from it: nothing of
    an earlier job is left, and only the first waits for the imports. An interruption of the caller reaches the script as
    SIGTERM, and so does the caller's death.

    Args:
        script: the file to run.
        arguments: its sys.argv without the program.
        log: file that stdout and stderr are appended to, locked while the script runs; None leaves them as they are.
    """
    process = start_fresh(script, arguments, log=log)
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    assert process.exitcode is not None, "joined"
    return process.exitcode


def start_fresh(script: Path, arguments: Sequence[str], *, log: Path | None) -> BaseProcess:
    """Start what `run_fresh` runs, and return its process."""
    # Not multiprocessing.Process of the default context, which forks this process with all it has loaded and locked.
    process: BaseProcess = _server().Process(  # type: ignore[attr-defined]
        target=_script, args=(str(script), list(arguments), log, dict(os.environ), os.getcwd())
    )
    with _usual_start_method():
        process.start()
    return process


def _server() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def _usual_start_method() -> Iterator[None]:
    """Pass on the platform's start method: that of joblib's workers does not exist in the server."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _script(script: str, arguments: list[str], log: Path | None, environment: Mapping[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the server has those of its own start: a launcher may set a device for each job
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # data workers start as they would without a server
    if log is not None:
        _write_to(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _write_to(log: Path) -> None:
    """Send stdout and stderr to the file; end here where another process does so already."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(BUSY) from None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a child"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the run saves, and the next sweep goes on from there
