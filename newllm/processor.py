"""What the processor of this machine is and can do, as its operating system tells. Imports no torch."""

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def told() -> str:
    """Return what the system says of the processor: maker, model and, on Linux, the names of its instruction sets."""
    return CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor()


def is_amd() -> bool:
    """Return whether AMD made it."""
    return "AuthenticAMD" in told()


def multiplies_bf16() -> bool:
    """Return whether it has instructions for products of bf16 matrices; False where the system does not tell."""
    return any(name in told() for name in ("amx_bf16", "avx512_bf16"))
