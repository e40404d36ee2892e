"""The run in TensorBoard: curves laid out by question, texts, hyperparameters with the final metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.callbacks.logger import Logger
from newllm.config.typed import flat, is_run_independent

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

# Tags are patterns that TensorBoard matches from the start of a name.
LAYOUT = {
    "loss": {
        "loss (nats per token)": ["Multiline", ["train/loss$", "val/loss"]],
        "bits per byte": ["Multiline", ["val/bits_per_byte$"]],
        "accuracy": ["Multiline", ["val/accuracy$"]],
    },
    "recurrence": {
        "lag: relative error": ["Multiline", ["lag/relative_error"]],
        "lag: contraction": ["Multiline", ["lag/contraction$"]],
        "lag: sweeps to tolerance": ["Multiline", ["lag/sweeps_to_tolerance$"]],
        "context: shares and ranks": ["Multiline", ["context/converged_share", "context/effective_rank"]],
        "context: losses": ["Multiline", ["context/fixed_point_loss", "context/diversity_loss"]],
        "context: norm": ["Multiline", ["context/norm_"]],
    },
    "memory": {
        "gate": ["Multiline", ["memory/gate"]],
        "read norm": ["Multiline", ["memory/read_norm"]],
        "decisions": ["Multiline", ["memory/expan", "memory/selection_entropy"]],
        "state bytes": ["Multiline", ["memory/state_bytes$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_second$"]],
        "share of the device's peak": ["Multiline", ["speed/mfu$"]],
        "share of time waiting for data": ["Multiline", ["speed/data_wait_share$"]],
        "gradient norm": ["Multiline", ["optim/grad_norm$"]],
        "learning rate": ["Multiline", ["optim/lr$"]],
    },
}


def settings(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return the settings that decide what is computed, by dotted key; all but numbers as text."""
    decisive = {key: value for key, value in flat(config).items() if not is_run_independent(key) and key != "name"}
    # TensorBoard would show True as 1.0.
    is_number = {key: isinstance(value, int | float) and not isinstance(value, bool) for key, value in decisive.items()}
    return {key: value if is_number[key] else str(value) for key, value in decisive.items()}


class TensorBoard(Logger):
    """Writes the event files of one run; the step axis is optimizer steps.

    Args:
        folder: the run's tensorboard/ folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def open(self, *, first_step: int = 0) -> None:
        """Start writing; what an earlier session wrote from `first_step` on is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=first_step)
        self._writer.add_custom_scalars(LAYOUT)

    @property
    def writer(self) -> "SummaryWriter":
        """The open writer; opened at need."""
        if self._writer is None:
            self.open()
        assert self._writer is not None
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of every name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def texts(self, name: str, texts: Sequence[str], step: int) -> None:
        """Show texts as they are, without markdown."""
        blocks = ("".join(f"    {line}\n" for line in text.splitlines() or [""]) for text in texts)
        self.writer.add_text(name, "\n---\n\n".join(blocks), step)

    def histogram(self, name: str, values: "Tensor", step: int) -> None:
        self.writer.add_histogram(name, values, step)

    def summary(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Fill the HParams page: the settings of this run beside its final metrics.

        The metrics are those whose curves are in this folder; TensorBoard shows the last point of each.
        """
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would put them into a run of their own, away from the curves.
        for summary in hparams(settings(config), dict(metrics)):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.flush()

    def flush(self) -> None:
        """Put on disk what was added so far."""
        self.writer.flush()

    def close(self) -> None:
        """Put everything on disk and stop writing."""
        self.writer.close()
        self._writer = None
