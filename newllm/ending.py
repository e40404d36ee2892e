"""Ends of a run that are no fault of the program: told in a sentence; the traceback is in FAILED for those who want it."""

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from newllm.guards.verdict import GuardFailure

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a file."""


class NotSaved(OSError):  # noqa: N818  # the disk failed, not the code
    """A checkpoint that could not be written; the message says what that means for the run."""


@contextmanager
def told_in_words() -> Iterator[None]:
    """End with exit code 1 and a few lines on stderr where a guard failed or the disk is full.

    Raises:
        SystemExit: 1 for such an end; everything else is raised as it is.
    """
    try:
        yield
    except GuardFailure as failure:
        _end("a guard failed, the run gives no number", [verdict.message for verdict in failure.verdicts])
    except NotSaved as error:
        _end("the run could not go on", [str(error)])
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{error.filename or 'a file of the run'}: cannot be written ({error.strerror})"
        advice = "Allowed: a folder with room. Make room, then resume the run or start it again."
        _end("the run could not go on", [f"{reason}. {advice}"])


def _end(what: str, reasons: Sequence[str]) -> NoReturn:
    print("\n".join([f"newllm: {what}:", *(f"  - {reason}" for reason in reasons)]), file=sys.stderr)
    raise SystemExit(1)
