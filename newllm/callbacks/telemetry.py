"""Everything a run measures, to metrics.jsonl and the loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from newllm.callbacks.logger import Logger
from newllm.callbacks.loop import has_stepped, is_training_validation
from newllm.callbacks.peak import peak_flops
from newllm.callbacks.speed import FetchTimer, SpeedMeter
from newllm.data.prepared import count_tokens_read
from newllm.run_record import append_metrics, keep_metrics, read_metrics

Line = dict[str, float | Tensor]


def _read(line: Line) -> dict[str, float]:
    """Bring the numbers of a line to the host, those of the device in one transfer: validations leave theirs on the host."""
    away = {name: value for name, value in line.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    fetched = torch.stack([value.double() for value in away.values()]).tolist() if away else []
    return {name: float(value) for name, value in {**line, **dict(zip(away, fetched, strict=True))}.items()}


class Telemetry(Callback):
    """Writes what the module and the callbacks log, beside speed, learning rate and gradient norm.

    Every n optimizer steps, and with every validation, one line {step, tokens, names...} holds what was logged since the
    line before. A value that was not logged again is not repeated. No step waits for the device except those that write.
    A line is written when the next step begins, so that everything logged around a step stands in one line.

    Put it first among the callbacks: the time of those after it does not count as training.

    Args:
        folder: run folder, where metrics.jsonl goes.
        log_every_steps: optimizer steps from one line to the next.
        loggers: where the same numbers go besides metrics.jsonl.
        train_flops_per_token: FLOPs of forward and backward, for speed/mfu; None leaves it out.
        precision: Lightning's precision flag, which decides the device's peak.

    Attributes:
        tokens: input tokens seen since the run began, padding left out, over all devices and sessions.
        last: newest value of every metric.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        log_every_steps: int,
        loggers: Sequence[Logger],
        train_flops_per_token: float | None = None,
        precision: str = "32-true",
    ) -> None:
        self.folder = Path(folder)
        self.log_every_steps = log_every_steps
        self.loggers = loggers
        self.train_flops_per_token = train_flops_per_token
        self.precision = precision
        self.tokens = 0
        self._uncounted = 0  # of this rank, not in `tokens` yet
        self.last: dict[str, float] = {}
        self._meter = SpeedMeter(None)
        self._peak: float | None = None
        self._lr = 0.0
        self._line: Line = {}
        self._seen: dict[str, Tensor] = {}

    @property
    def tokens_per_second(self) -> float:
        """Mean training speed of this session."""
        return self._meter.tokens_per_second

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
            trainer.profiler = FetchTimer()  # type: ignore[attr-defined]
        profiler = trainer.profiler  # type: ignore[attr-defined]
        self._meter = SpeedMeter(profiler if isinstance(profiler, FetchTimer) else None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._peak = peak_flops(name, self.precision)
        if not trainer.is_global_zero:
            return
        # A line that was open when the checkpoint was saved is written again.
        kept = trainer.global_step - (1 if self._line else 0)
        keep_metrics(self.folder, up_to_step=kept)
        for line in read_metrics(self.folder):
            self.last |= line
        for logger in self.loggers:
            logger.open(first_step=kept + 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer)
        # The schedule moves on before the step's last hook: this is the rate the step is made with.
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        self._meter.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, tokens = trainer.global_step, count_tokens_read(batch)
        self._uncounted += tokens
        is_due = has_stepped(trainer) and (step % self.log_every_steps == 0 or step == trainer.max_steps)
        if is_due and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # otherwise the clock shows how fast work is queued
        self._meter.end_step(tokens * trainer.world_size)
        if is_due or trainer.world_size == 1:
            self._count(trainer)
        if is_due:
            self._line = {"step": step, "tokens": self.tokens, "optim/lr": self._lr, **self._speeds(trainer)}
            grad_norm = getattr(pl_module, "last_grad_norm", None)
            if grad_norm is not None:
                self._line["optim/grad_norm"] = grad_norm.detach().clone()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_training_validation(trainer):
            self._count(trainer)
            self._line = {"step": trainer.global_step, "tokens": self.tokens, **self._line}
            self._gather(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)
        if trainer.is_global_zero:
            for logger in self.loggers:
                logger.flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._count(trainer)
        if self._line:
            self._gather(trainer)
        checkpoint["telemetry"] = {"tokens": self.tokens, "line": _read(self._line)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self.tokens, self._line = checkpoint["telemetry"]["tokens"], dict(checkpoint["telemetry"]["line"])

    def record(self, values: Mapping[str, float]) -> None:
        """Add metrics measured after training to the last line; call it on one rank only."""
        lines = read_metrics(self.folder)
        line = {**lines[-1], **values} if lines else {"step": 0, "tokens": self.tokens, **values}
        keep_metrics(self.folder, up_to_step=int(line["step"]) - 1)
        self._put(line, values)

    def _count(self, trainer: Trainer) -> None:
        """Add the tokens of all ranks, which need not have rows alike; they ask each other at the same steps."""
        own, self._uncounted = self._uncounted, 0
        if trainer.world_size > 1:
            own = int(trainer.strategy.reduce(torch.tensor(own, device=trainer.strategy.root_device), reduce_op="sum"))
        self.tokens += own

    def _speeds(self, trainer: Trainer) -> dict[str, float]:
        speeds = self._meter.read()
        if self._peak is not None and self.train_flops_per_token is not None:
            flops = speeds["speed/tokens_per_second"] * self.train_flops_per_token
            speeds["speed/mfu"] = flops / (self._peak * trainer.world_size)
        return speeds

    def _gather(self, trainer: Trainer) -> None:
        """Take what was logged since the last time into the open line.

        Lightning keeps showing old values. A new one lies elsewhere in memory, as long as the old one is held.
        """
        metrics = trainer.callback_metrics
        for name, value in metrics.items():
            base = name.removesuffix("_step").removesuffix("_epoch")  # Lightning's second names for one value
            if base != name and base in metrics:
                continue
            if name not in self._seen or self._seen[name].data_ptr() != value.data_ptr():
                self._seen[name] = value
                self._line[name] = value

    def _write(self, trainer: Trainer) -> None:
        if not self._line:
            return
        self._gather(trainer)
        line, self._line = _read(self._line), {}
        if trainer.is_global_zero:
            self._put(line, {name: value for name, value in line.items() if name not in ("step", "tokens")})
            self._show_histograms(trainer, int(line["step"]))

    def _show_histograms(self, trainer: Trainer, step: int) -> None:
        """Show each distribution once, with the line that follows it."""
        shown: dict[str, Tensor] = getattr(trainer.lightning_module, "histograms", {})
        for name, values in shown.items():
            for logger in self.loggers:
                logger.histogram(name, values, step)
        shown.clear()

    def _put(self, line: dict[str, float], new: Mapping[str, float]) -> None:
        step, tokens = int(line["step"]), int(line["tokens"])
        append_metrics(self.folder, {**line, "step": step, "tokens": tokens})
        self.last |= new
        for logger in self.loggers:
            logger.scalars(step, {"tokens": tokens, **new})
