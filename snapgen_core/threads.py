"""How many threads the maths may use: one per physical core that this process may run on.

More threads than free cores make torch many times slower, so the count honours hyper-threads, CPU affinity and a
container's CPU quota. Standard library only: the Makefile runs this file by itself, before anything is installed.
"""

import os
import subprocess
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _mac_cores() -> int | None:
    try:
        answer = subprocess.run(["sysctl", "-n", "hw.physicalcpu"], capture_output=True, text=True, check=True)
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _quota(text: str | None) -> int | None:
    """Whole cores granted by a cgroup's `cpu.max` ("200000 100000" is two cores, "max 100000" is no limit)."""
    limit, _, period = (text or "max").partition(" ")
    if limit == "max":
        return None
    return max(1, int(limit) // int(period or 100_000))


def physical_cores() -> int:
    """Physical cores this process may use, at least 1."""
    cpus = _allowed_cpus()
    # CPUs that are hyper-threads of one core share one siblings list, so counting the lists counts the cores.
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in cpus}
    cores = len(siblings)
    if not hasattr(os, "sched_getaffinity"):
        cores = _mac_cores() or cores
    return max(1, min(cores, _quota(_read("/sys/fs/cgroup/cpu.max")) or cores))


def cap_threads() -> None:
    """Set the thread variables where the user has not. Must run before torch or numpy is imported."""
    wanted = os.environ.get("OMP_NUM_THREADS") or str(physical_cores())
    for name in VARIABLES:
        os.environ.setdefault(name, wanted)


if __name__ == "__main__":
    print(physical_cores())
