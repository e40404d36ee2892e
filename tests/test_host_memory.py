"""Memory that tensors free is there for the next ones."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from newllm.host_memory import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        [torch.ones(2**24), torch.ones(2**23)]  # 64 and 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults(4)
keep_freed_memory()
faults(4)
print(given_back, faults(4))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_memory_that_is_freed_is_kept_for_the_next_step() -> None:
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120)

    given_back, kept = map(int, told.stdout.split())
    assert given_back > 100, "new pages were not new: this shows nothing"
    assert kept < given_back / 4
