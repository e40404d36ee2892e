"""What callbacks need to know about Lightning's training loop and its public interface does not say."""

from typing import Any

from lightning.pytorch import Trainer
from torch.amp import GradScaler


def has_stepped(trainer: Trainer) -> bool:
    """Return whether the batch that has just ended closed an optimizer step; False while gradients accumulate."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def loss_scaler(trainer: Trainer) -> GradScaler | None:
    """Return what scales the losses of fp16, whose gradients overflow now and then by design; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether the loop will validate after the batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None, "asked outside of training"
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validate_every(trainer: Trainer, steps: int) -> None:
    """Have the loop validate after every so many optimizer steps.

    Lightning counts batches, of which the last step of an epoch may have fewer than the others. Its own rules hold beside this:
    a run that stops is validated.

    Args:
        trainer: made with val_check_interval=1 and check_val_every_n_epoch=None.
        steps: between two validations.
    """
    loop = trainer.fit_loop.epoch_loop
    may_validate = loop._should_check_val_fx

    def is_due(fetcher: Any) -> bool:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return (stops or (has_stepped(trainer) and trainer.global_step % steps == 0)) and may_validate(fetcher)

    loop._should_check_val_fx = is_due  # type: ignore[method-assign, assignment]


def is_training_validation(trainer: Trainer) -> bool:
    """Return whether the validation that is running belongs to training, and is not the check before it."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking
