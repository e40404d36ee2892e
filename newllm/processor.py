"""What the processor of this machine is and can do, as its operating system tells. Imports no torch."""

import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def told() -> str:
    """Return what the system says of the processor: maker, model and, on Linux, the names of its instruction sets."""
    return CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor()


def name() -> str:
    """Return maker and model in a word or two, "AMD EPYC 9B45" say; the machine's architecture where the system does not tell.

    Where it tells a maker's name without a model, as virtual machines do, what is known of the generation stands for that.
    """
    brand = re.search(r"^model name\s*: (.*)$", told(), re.MULTILINE)
    if brand is None:
        return platform.processor() or platform.machine()
    words = " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core|@.*", "", brand[1]).split())
    return f"{words} (Zen {zen_generation()})" if zen_generation() and not re.search(r"\d", words) else words


def zen_generation() -> int:
    """Return the generation of AMD's processors from Zen 3 on, 5 for that and all after it; 0 for any other."""
    family = re.search(r"^cpu family\s*: (\d+)$", told(), re.MULTILINE)
    if "AuthenticAMD" not in told() or family is None or int(family[1]) < 25:
        return 0
    if int(family[1]) == 25:
        return 4 if "avx512f" in told() else 3  # of one family, told apart by what only the later has
    return 5


def multiplies_bf16() -> bool:
    """Return whether it has instructions for products of bf16 matrices; False where the system does not tell."""
    return any(instruction in told() for instruction in ("amx_bf16", "avx512_bf16"))
