"""Our warnings on the terminal: the sentence alone, once, without the line of code that Python shows with it."""

import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parent)

_told: set[str] = set()
_usual_format = warnings.formatwarning


def show_plainly() -> None:
    """Print warnings of this package as `newllm: <sentence>`, each once however often the filters are changed; others as before."""
    global _usual_format
    if warnings.formatwarning is not _format:  # Lightning has put its own there when it was imported
        _usual_format = warnings.formatwarning
        warnings.formatwarning = _format


def _format(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if not filename.startswith(PACKAGE):
        return _usual_format(message, category, filename, lineno, line)
    text = f"newllm: {message}\n"
    if text in _told:
        return ""
    _told.add(text)
    return text
