"""Memory that tensors free is there for the next ones."""

import ctypes
import subprocess
import sys

import pytest
import torch

from newllm.hardware import spare_filling

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
faults(20)  # until its pieces lie where they fit
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


def test_results_are_not_written_twice_for_the_same_digits() -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(2**10).isnan().all()
        spare_filling()
        old = torch.full((2**10,), 3.0)
        del old
        assert not torch.empty(2**10).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
