"""A script in a fresh process behaves as on the command line, and ends with who waits for it."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from newllm.jobs import process
from newllm.jobs.process import BUSY, run_fresh


@pytest.fixture(autouse=True)
def _no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PRELOADED", process.PRELOADED[:1])  # the scripts need no torch


def written(folder: Path, text: str) -> Path:
    script = folder / "script.py"
    script.write_text(text)
    return script


def test_a_script_gets_its_arguments_and_environment_and_leaves_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = written(
        tmp_path, "import os, sys\nprint(sys.argv[1:], os.environ['DEVICE'], __name__)\nos.write(2, b'told\\n')"
    )
    codes = []

    for device in ("3", "4"):
        monkeypatch.setenv("DEVICE", device)
        codes.append(run_fresh(script, ["a=1", device], log=tmp_path / "log.txt"))

    assert codes == [0, 0]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sorted(lines) == ["['a=1', '3'] 3 __main__", "['a=1', '4'] 4 __main__", "told", "told"]


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(2)", 2), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("sys.exit()", 0)],
)
def test_exit_codes_tell_how_a_script_ended(ending: str, code: int, tmp_path: Path) -> None:
    script = written(tmp_path, f"import os, signal, sys\n{ending}")

    assert run_fresh(script, [], log=tmp_path / "log.txt") == code
    assert ("ZeroDivisionError" in (tmp_path / "log.txt").read_text()) == (code == 1)


def test_nothing_is_left_of_the_script_before(tmp_path: Path) -> None:
    script = written(tmp_path, "import json\nassert not hasattr(json, 'left')\njson.left = 1")

    assert [run_fresh(script, [], log=None) for _ in range(2)] == [0, 0]


def test_a_log_in_use_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"

    with open(log, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code = run_fresh(written(tmp_path, "print('ran')"), [], log=log)

    assert code == BUSY
    assert log.read_text() == ""


def test_the_server_leaves_ctrl_c_to_the_sweep(tmp_path: Path) -> None:
    """Else its imports end in a traceback on the terminal."""
    script = written(tmp_path, "import signal\nprint(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)")

    run_fresh(script, [], log=tmp_path / "log.txt")

    assert (tmp_path / "log.txt").read_text() == "True\n"


def test_data_workers_start_as_they_would_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    script = written(tmp_path, "import multiprocessing\nprint(multiprocessing.get_start_method())")
    usual = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)

    try:
        run_fresh(script, [], log=tmp_path / "log.txt")
        kept = multiprocessing.get_start_method()
    finally:
        multiprocessing.set_start_method(before, force=True)

    assert (tmp_path / "log.txt").read_text() == usual
    assert kept == "spawn"


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_script_is_told_to_stop_when_its_caller_ends(ending: signal.Signals, tmp_path: Path) -> None:
    script = written(
        tmp_path,
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    pathlib.Path(sys.argv[2]).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(100)\n",
    )
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom newllm.jobs import process\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "if __name__ == '__main__':\n    process.PRELOADED = []\n"
        "    process.run_fresh(Path(sys.argv[1]), sys.argv[2:], log=None)\n"
    )
    began, stopped = tmp_path / "began", tmp_path / "stopped"
    environment = {**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[2])}
    running = subprocess.Popen([sys.executable, caller, script, began, stopped], env=environment)
    waited_for(began)

    running.send_signal(ending)

    waited_for(stopped)
    running.wait(30)


def waited_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear in a minute")
