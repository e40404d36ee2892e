"""SIGTERM and Ctrl-C while no training is under way: during the imports, before the first step, or after the last."""

import os
import signal
from types import FrameType
from typing import NoReturn


def leave_on_signal() -> None:
    """Make SIGTERM and SIGINT end the program with a message and exit code 143 or 130, until training listens for them itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    # Not print(): a signal may arrive in the middle of one.
    os.write(2, f"\n{name}: stopped while no training was under way, so there was nothing to save\n".encode())
    raise SystemExit(128 + number)
