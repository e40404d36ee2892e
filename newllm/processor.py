"""What the processor of this machine is and can do, as its operating system tells. Imports no torch."""

import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def told() -> str:
    """Return what the system says of the processor: maker, model and, on Linux, the names of its instruction sets."""
    return CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor()


def name() -> str:
    """Return maker and model in a word or two, "AMD EPYC 9B45" say; the machine's architecture where the system does not tell."""
    brand = re.search(r"^model name\s*: (.*)$", told(), re.MULTILINE)
    if brand is None:
        return platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core|@.*", "", brand[1]).split())


def is_amd() -> bool:
    """Return whether AMD made it."""
    return "AuthenticAMD" in told()


def multiplies_bf16() -> bool:
    """Return whether it has instructions for products of bf16 matrices; False where the system does not tell."""
    return any(instruction in told() for instruction in ("amx_bf16", "avx512_bf16"))
