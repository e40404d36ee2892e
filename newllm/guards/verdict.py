"""What a guard says, and what happens when it says no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "warning", "failed", "not applicable", "off"]


@dataclass(frozen=True)
class Verdict:
    """What one guard found.

    Attributes:
        name: name of the guard.
        status: `failed` ends the run; `warning` is recorded beside its numbers; `off` was switched off by the user.
        message: a full sentence.
        figures: what was measured; plain values that JSON can hold.
    """

    name: str
    status: Status
    message: str
    figures: dict[str, Any] = field(default_factory=dict)


class GuardFailure(RuntimeError):  # noqa: N818  # the run failed, not the code
    """A run that must not produce a number.

    Args:
        verdicts: what the guards found; the failed ones make the message.
    """

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = [verdict for verdict in verdicts if verdict.status == "failed"]
        super().__init__("\n".join(verdict.message for verdict in self.verdicts))


def require_passed(verdicts: Sequence[Verdict]) -> None:
    """Raise GuardFailure if any guard failed, with the messages of all that did.

    Raises:
        GuardFailure: a verdict is `failed`.
    """
    if any(verdict.status == "failed" for verdict in verdicts):
        raise GuardFailure(verdicts)


def switched_off(name: Literal["preflight", "monitor"]) -> Verdict:
    """Return the record that the user did without a group of guards."""
    return Verdict(name, "off", f"guards.{name}=false: nothing was checked by these guards.")
