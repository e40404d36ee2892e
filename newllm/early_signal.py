"""SIGTERM while no training is under way: before the first step, or after the last."""

import os
import signal
from types import FrameType
from typing import NoReturn


def leave_on_sigterm() -> None:
    """Make SIGTERM end the program with a message and exit code 143, until training listens for it itself."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # Not print(): a signal may arrive in the middle of one.
    os.write(2, b"\nSIGTERM: stopped while no training was under way, so there was nothing to save\n")
    raise SystemExit(128 + number)
