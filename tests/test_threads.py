"""The number of threads: one per physical core that this process may use."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from snapgen_core import threads


def test_agrees_with_psutil_where_nothing_limits():
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = threads.physical_cores()
    assert 1 <= cores <= (psutil.cpu_count(logical=False) or allowed)
    assert cores <= allowed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_honours_affinity():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{one}}}); from snapgen_core.threads import physical_cores; print(physical_cores())"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True).stdout == "1\n"


def test_hyper_threads_count_once(monkeypatch):
    pairs = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: set(pairs))
    monkeypatch.setattr(threads, "_read", lambda path: pairs[int(path.split("/cpu")[2].split("/")[0])] if "topology" in path else None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(pairs), raising=False)
    assert threads.physical_cores() == 2


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("200000 100000", 2), ("50000 100000", 1), (None, None)])
def test_reads_a_containers_quota(text, cores):
    assert threads._quota(text) == cores


def test_leaves_the_users_choice_alone(monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads.cap_threads()
    assert [os.environ[name] for name in threads.VARIABLES] == ["3"] * 3


def test_runs_alone_before_anything_is_installed():
    file = Path(threads.__file__)
    alone = subprocess.run([sys.executable, "-I", "-S", file], capture_output=True, text=True, check=True)
    assert int(alone.stdout) == threads.physical_cores()
