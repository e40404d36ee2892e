"""What callbacks need to know about Lightning's training loop and its public interface does not say."""

from lightning.pytorch import Trainer


def has_stepped(trainer: Trainer) -> bool:
    """Return whether the batch that has just ended closed an optimizer step; False while gradients accumulate."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether the loop will validate after the batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None, "asked outside of training"
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_training_validation(trainer: Trainer) -> bool:
    """Return whether the validation that is running belongs to training, and is not the check before it."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking
