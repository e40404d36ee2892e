"""One line that tells how far training is."""

from time import perf_counter
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from newllm.callbacks.loop import has_stepped
from newllm.data.prepared import count_tokens_read


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress(Callback):
    """Tells step, loss, validation loss, tokens per second and the time left.

    In a terminal one line is kept up to date; elsewhere (a log file, a pipe) a line is added every now and then.

    Args:
        every_seconds: time between lines where the stream is no terminal.
        stream: where the line goes.
        terminal_seconds: time between updates in a terminal; each update waits for the device once.
    """

    def __init__(self, *, every_seconds: float, stream: TextIO, terminal_seconds: float = 0.5) -> None:
        self.stream = stream
        self.period = terminal_seconds if stream.isatty() else every_seconds
        self._tokens = 0
        self._line = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens = 0
        self._start = (perf_counter(), trainer.global_step)
        self._mark = (perf_counter(), 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += count_tokens_read(batch) * trainer.world_size
        if not trainer.is_global_zero or not has_stepped(trainer):
            return
        if perf_counter() - self._mark[0] >= self.period or trainer.global_step == trainer.max_steps:
            self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.stream.isatty() and self._line:
            print(file=self.stream, flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _tell(self, trainer: Trainer) -> None:
        now = perf_counter()
        speed = (self._tokens - self._mark[1]) / max(now - self._mark[0], 1e-9)
        self._mark = (now, self._tokens)
        self._line = self._describe(trainer, speed, now)
        if self.stream.isatty():
            print(f"\r{self._line}\x1b[K", end="", file=self.stream, flush=True)  # \x1b[K clears the rest of the line
        else:
            print(self._line, file=self.stream, flush=True)

    def _describe(self, trainer: Trainer, speed: float, now: float) -> str:
        step, total, metrics = trainer.global_step, trainer.max_steps, trainer.callback_metrics
        parts = [f"step {step}/{total}" if total > 0 else f"step {step}"]
        for name, label in (("train/loss", "loss"), ("val/loss", "val loss")):
            if name in metrics:
                parts.append(f"{label} {metrics[name].item():.3f}")
        parts.append(f"{speed:,.0f} tokens/s")
        if total > 0:
            began, first_step = self._start
            parts.append(f"ETA {_clock((total - step) * (now - began) / max(step - first_step, 1))}")
        return "  ".join(parts)
