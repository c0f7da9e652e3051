"""Memory: kept while a run trains, given back where it is much and when the run is over."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from trainer.run.memory import resident_mib, return_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another malloc keeps it or not"
)


def test_much_memory_that_is_free_goes_back_to_the_system() -> None:
    blocks = [bytes(100_000) for _ in range(3000)]
    held = resident_mib()["resident_mib"]
    del blocks[:-1]  # the last one keeps the heap from shrinking
    return_memory()
    assert resident_mib()["resident_mib"] < held - 200


KEEPS = """
import resource
import torch
from trainer.run.memory import kept_memory, resident_mib, return_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in range(20, 30):
        torch.zeros(size * 2**18)  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return resident_mib()["resident_mib"]

anew, before = faults(), held()
with kept_memory():
    faults()
    return_memory()  # it is not much
    assert faults() < anew / 10, anew
    torch.zeros(300 * 2**18)
    most = held()
    return_memory()
    assert held() < most - 200
    torch.zeros(200 * 2**18)
    assert held() > before + 150
assert held() < before + 50  # what was free has gone back
torch.zeros(300 * 2**18)
assert held() < before + 50  # and goes back at once
"""


def test_memory_of_large_arrays_is_kept_for_the_next_until_it_is_much_or_all_is_over() -> None:
    # in a process of its own: what is set is of the whole process
    subprocess.run([sys.executable, "-c", KEEPS], check=True, timeout=60)
