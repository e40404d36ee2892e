"""What the model writes while it learns."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from newllm.callbacks.logger import Logger
from newllm.callbacks.loop import has_stepped
from newllm.whole_file import write_whole


class Samples(Callback):
    """Writes generated texts to samples.txt and the loggers every n optimizer steps.

    Looking changes nothing: the model is in eval mode, without gradient, and the random numbers of training go on as if
    nothing had been drawn.

    Args:
        folder: run folder, where samples.txt goes.
        every_steps: optimizer steps from one set of samples to the next.
        sample: returns the texts to show.
        loggers: where the texts go as well.
    """

    def __init__(
        self, folder: str | Path, *, every_steps: int, sample: Callable[[], list[str]], loggers: Sequence[Logger]
    ) -> None:
        self.path = Path(folder) / "samples.txt"
        self.every_steps = every_steps
        self.sample = sample
        self.loggers = loggers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.path.exists():
            # Texts are indented, so only our own headings start a line; a resumed run writes the later ones again.
            parts = re.split(r"(?m)^(?=step \d+$)", self.path.read_text(encoding="utf-8"))
            kept = [part for part in parts if part and int(part.split(maxsplit=2)[1]) <= trainer.global_step]
            write_whole(self.path, "".join(kept))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not has_stepped(trainer) or trainer.global_step % self.every_steps != 0:
            return
        texts = self._generate(pl_module)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"step {trainer.global_step}\n")
            for text in texts:
                file.write("".join(f"    {line}\n" for line in text.splitlines() or [""]) + "\n")
        for logger in self.loggers:
            logger.texts("samples", texts, trainer.global_step)

    def _generate(self, pl_module: LightningModule) -> list[str]:
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                return self.sample()
        finally:
            for module, is_training in modes:
                module.training = is_training
