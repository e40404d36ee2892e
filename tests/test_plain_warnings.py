"""What our warnings look like on a terminal."""

import warnings
from pathlib import Path

import pytest

import newllm
from newllm.plain_warnings import show_plainly
from newllm.run import _quieten


def test_our_warnings_are_one_sentence_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", lambda *_: "as Python does")
    ours = str(Path(newllm.__file__).parent / "data" / "corpus.py")

    show_plainly()
    show_plainly()

    shown = [warnings.formatwarning("one of ours.", UserWarning, where, 87) for where in (ours, ours, "elsewhere.py")]
    assert shown == ["newllm: one of ours.\n", "", "as Python does"]


def test_lightning_says_nothing_of_our_own_hooks() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _quieten()
        warnings.warn("You have overridden `transfer_batch_to_device` in `LightningModule` but", stacklevel=1)

    assert said == []
