"""Writes that are whole or not at all."""

import json
import math
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from snapgen_core.files import append_jsonl, atomic_folder, atomic_write, git_commit, now, write_json


def test_write_puts_the_content_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as part:
        part.write_text("new")
        assert part.suffix == ".txt" and part.parent == tmp_path and not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    script = (
        "import os, signal, sys\nfrom snapgen_core.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as part:\n    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["a.txt"]


def test_write_keeps_a_link_a_link(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"


def test_write_refuses_a_folder_and_a_missing_parent(tmp_path):
    with pytest.raises(OSError), atomic_write(tmp_path) as part:
        part.write_text("x")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "a.txt") as part:
        part.write_text("x")


def test_written_files_get_the_usual_rights(tmp_path):
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "checkpoints" / "step-1"  # the parent is made too
    for content in ("one", "two"):
        with atomic_folder(target) as part:
            (part / "sub").mkdir()
            (part / "sub" / content).write_text(content)
    assert [p.name for p in target.rglob("*")] == ["sub", "two"]
    assert os.listdir(target.parent) == ["step-1"]


def test_a_failed_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as part:
        (part / "weights").write_text("half")
        raise RuntimeError
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_json_holds_plain_values_and_stays_json_with_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"t": torch.tensor(2.5), "n": np.arange(2), "p": Path("x"), 3: (1, None), "bad": math.nan, "inf": -math.inf})
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert strict == {"t": 2.5, "n": [0, 1], "p": "x", "3": [1, None], "bad": "nan", "inf": "-inf"}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')  # killed here
    append_jsonl(path, {"step": 3, "note": "two\nlines"})
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0]) == {"step": 1} and json.loads(lines[2])["step"] == 3


def test_commit_is_the_one_git_names():
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = git_commit()
    if head.returncode:  # no clone, or one without commits
        assert commit is None
    else:
        assert head.stdout.startswith(commit.removesuffix("-dirty")) and len(commit) >= 12


def test_now_is_utc_in_iso_form():
    age = datetime.now(UTC) - datetime.fromisoformat(now())
    assert 0 <= age.total_seconds() < 60
