"""newllm: research on small language models that keep something between positions or between texts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newllm.load import load_run as load_run
    from newllm.models.create import create_model as create_model
    from newllm.session import MemorySession as MemorySession

__all__ = ["MemorySession", "create_model", "load_run"]

_HOMES = {"create_model": "newllm.models.create", "load_run": "newllm.load", "MemorySession": "newllm.session"}


def __getattr__(name: str) -> Any:
    # On first use: configuration errors and reports answer without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'newllm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
