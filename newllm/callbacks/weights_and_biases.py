"""The run in Weights & Biases; the wandb package is an extra."""

import html
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newllm.callbacks.logger import Logger
from newllm.callbacks.tensorboard import settings
from newllm.whole_file import write_whole

PROJECT = "newllm"  # unless WANDB_PROJECT says otherwise


class WeightsAndBiases(Logger):
    """Sends a run's numbers, settings and texts to Weights & Biases; with WANDB_MODE=offline to the run folder alone.

    The package's own variables hold: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_BASE_URL and so on. A resumed run goes
    on under its id. The steps it makes again are there twice, with equal values: continuing is exact.

    Args:
        folder: run folder; what the package writes lies in its wandb/.
        config: the resolved configuration in plain containers.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.config = config
        self._run: Any = None

    def open(self, *, first_step: int = 0) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=str(self.config["name"]),
            name=self.folder.name,
            id=self._id(),
            resume="allow",
            dir=str(self.folder.resolve()),
            config=settings(self.config),
            # The run has its own record of code and machine; what it prints is nobody else's.
            settings=wandb.Settings(quiet=True, console="off", disable_git=True, save_code=False, x_disable_stats=True),
        )
        # Not the package's own counter, which cannot go back to where a run is resumed.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._opened().log({"step": step, **values})

    def texts(self, name: str, texts: Sequence[str], step: int) -> None:
        import wandb

        shown = "<hr>".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        self._opened().log({"step": step, name: wandb.Html(shown)})

    def summary(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._opened().summary.update(dict(metrics))

    def flush(self) -> None:
        """Do nothing: a process of the package's own writes and sends."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _opened(self) -> Any:
        if self._run is None:
            self.open()
        return self._run

    def _id(self) -> str:
        """The run's id in the service, kept in the run folder."""
        path = self.folder / "wandb" / "id.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8")
