"""A module, its data and a trainer small enough to run whole in every test of the callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from newllm.data.loader import leave_signals_to_parent

BATCH, BLOCK = 2, 3


class Blocks(Dataset):
    def __init__(self, number: int) -> None:
        self.input_ids = torch.randint(0, 11, (number, BLOCK), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "sample_id": torch.tensor(index)}


class TinyModule(LightningModule):
    """Predicts a token from itself; the validation losses can be prescribed."""

    def __init__(self, *, val_losses: Sequence[float] = (), logs_rarely_every: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Embedding(11, 5), torch.nn.Linear(5, 11))
        self.val_losses = list(val_losses)
        self.logs_rarely_every = logs_rarely_every
        self.last_grad_norm: Tensor | None = None
        self.seen: list[int] = []

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.net(batch["input_ids"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += batch["sample_id"].tolist()
        loss = self._loss(batch)
        self.log("train/loss", loss)
        if (self.global_step + 1) % self.logs_rarely_every == 0:
            self.log("lag/contraction", loss.detach() / 10)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = torch.tensor(self.val_losses[0]) if self.val_losses else self._loss(batch)
        self.log("val/loss", loss, batch_size=BATCH)

    def on_validation_epoch_end(self) -> None:
        if self.val_losses and not self.trainer.sanity_checking:
            self.val_losses.pop(0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
        self.last_grad_norm = torch.stack(norms).norm()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: LightningModule,
    callbacks: list[Callback],
    *,
    max_steps: int,
    resume: Path | None = None,
    validate_every_batches: int = 3,
    train_blocks: int = 10,
    accumulate: int = 1,
    num_workers: int = 0,
    **trainer_options: Any,
) -> Trainer:
    """Train for some steps on shuffled data: 10 blocks are 5 batches an epoch."""
    torch.manual_seed(2)
    train = StatefulDataLoader(
        Blocks(train_blocks),
        batch_size=BATCH,
        shuffle=True,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_parent,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every_batches,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **trainer_options},
    )
    validation = StatefulDataLoader(Blocks(4), batch_size=BATCH)
    trainer.fit(module, train, validation, ckpt_path=None if resume is None else str(resume))
    return trainer
