"""A run of train.py that waits: after every so many optimizer steps it says so and goes on when a line arrives.

`python -m bench.stepping_run STEPS [group=option] [key=value]`. Everything else is the run as a user starts it.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, Trainer

from newllm import run
from newllm.config.command_line import check_command_line


class Waits(Callback):
    """Hands over after every so many steps; the last of the callbacks, so that their time counts."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        sys.stdin.readline()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.steps == 0:
            print("steps made", flush=True)
            if not sys.stdin.readline():
                sys.exit(0)


def main() -> None:
    """Add the callback to those of the run, then run train.py."""
    waits, own = Waits(int(sys.argv.pop(1))), run._callbacks
    run._callbacks = lambda *given: [*own(*given), waits]
    import train

    sys.argv[1:] = check_command_line(sys.argv[1:], root="train")
    train.train()


if __name__ == "__main__":
    main()
