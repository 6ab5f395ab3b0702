"""Writing files so that a reader never meets half of one.

Everything is written beside its target under a passing name, then renamed: a killed process leaves the old file, or the
new one, or a stray `.*.part` that nothing reads.
"""

import json
import math
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def _passing_name(target: Path) -> Path:
    # Keeps the suffix, which image and tensor writers pick their format by; short, so that no long name grows too long.
    return target.parent / f".{secrets.token_hex(4)}.part{target.suffix}"


def _sync(path: Path) -> None:
    """Push a file's content to the disk, so that the rename cannot reach it first."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends well and vanishes when it does not.

    The folder must exist. A link is followed, so it stays a link. Raises OSError as the writing itself would.
    """
    target = Path(os.path.realpath(path))
    part = _passing_name(target)
    try:
        yield part
        _sync(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `path` when the block ends well and vanishes otherwise.

    No system call swaps two folders everywhere, so between two renames there is an instant without `path`; a process
    killed there leaves both folders whole under passing names. A new folder, as a checkpoint is, has no such instant.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part, old = _passing_name(target), _passing_name(target)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            os.replace(target, old)
        os.replace(part, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _plain(value: Any) -> Any:
    """JSON's own types for what logs hold: paths, tuples, numbers of numpy and torch. NaN and infinities have no JSON;
    they become the strings "nan", "inf", "-inf", so that a broken run stays readable."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append `record` as one line, written in one go. After a line torn by a kill, starts on a line of its own."""
    line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file that `append_jsonl` wrote; none where there is no file, and without lines that a kill cut short."""
    records = []
    for line in Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def git_commit() -> str | None:
    """Commit that the running code comes from, with "-dirty" where it was changed since; None outside a clone."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # else git would name the commit of some repository further up
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The date and time in UTC, for results and cards: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
