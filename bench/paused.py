"""A training loop of somebody else, run in a thread that stands still until it is asked for more steps."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Paused:
    """Calling it lets the loop run until its next pause; loops that take turns are never busy at once.

    Args:
        loop: runs for as long as it likes and calls the function it is given after every unit of work.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        self._may_go, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def __call__(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._may_go.release()
        self._has_paused.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop: Callable[[Callable[[], None]], None]) -> None:
        self._may_go.acquire()
        try:
            loop(self._pause)
        except BaseException as error:
            self._error = error
        self._has_paused.release()

    def _pause(self) -> None:
        self._has_paused.release()
        self._may_go.acquire()
