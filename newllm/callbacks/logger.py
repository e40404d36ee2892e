"""Where a run's numbers go besides metrics.jsonl: what every such place can be told."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Logger(ABC):
    """A place for the numbers of one run; names and steps are those of metrics.jsonl, one process writes."""

    @abstractmethod
    def open(self, *, first_step: int = 0) -> None:
        """Start writing; what an earlier session wrote from `first_step` on counts no more."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add what was measured at an optimizer step; called again for a step it adds to it."""

    def texts(self, name: str, texts: Sequence[str], step: int) -> None:  # noqa: B027 a table of numbers has no place for them
        """Show texts of an optimizer step, where there is a place for texts."""

    def histogram(self, name: str, values: "Tensor", step: int) -> None:  # noqa: B027
        """Show how the values of an optimizer step are distributed, where there is a place for pictures."""

    def summary(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Show the run's settings beside its final metrics, where runs can be compared."""

    @abstractmethod
    def flush(self) -> None:
        """Put on disk what was added so far."""

    @abstractmethod
    def close(self) -> None:
        """Put everything on disk and stop writing."""
