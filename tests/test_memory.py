"""Freed memory is kept: counted in page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest

from snapgen_core import memory

LOOP = """
import ctypes, resource, sys
from snapgen_core.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE = 20 * 2**20


def use_and_free():
    blocks = [libc.malloc(ctypes.c_size_t(SIZE)) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in reversed(blocks):
        libc.free(ctypes.c_void_p(block))


if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    use_and_free()  # the first rounds fetch it
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such switch")
def test_a_loop_gets_its_memory_back_without_page_faults():
    assert faults("keep") < 1_000 < 100_000 < faults("default")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # would fail if it were touched
    assert memory.keep_freed_memory() is False
