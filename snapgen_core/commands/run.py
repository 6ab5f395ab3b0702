"""`snapgen run`: the notebook series through papermill, executed copies kept."""

import argparse
import ast
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..paths import home, notebooks_dir, runs_dir


class Stopped(Exception):
    """A notebook did not reach its end; the text says where and why, in one line."""


def select(names: list[str]) -> list[Path]:
    """Notebooks by number ("03"), name ("03_flow_matching") or file; the whole series, in order, for an empty list."""
    folder = notebooks_dir()
    series = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not series:
        raise UserError(f"no notebooks in {folder}: run from a clone of the repository or set SNAPGEN_HOME to one")
    if not names:
        return series
    return [_find(name, series) for name in names]


def _find(name: str, series: list[Path]) -> Path:
    for path in series:
        if name in (path.name, path.stem, path.stem[:2]):
            return path
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    raise UserError(f"no notebook {name!r}: choose among {', '.join(path.stem for path in series)}")


def parameter_names(notebook: Path) -> set[str]:
    """Names assigned in the notebook's cell with the tag `parameters`; empty without such a cell."""
    try:
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        lines = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise UserError(f"{notebook} is not a notebook that can be run: {reason(error)}") from None
    assigned = [line for line in lines if isinstance(line, (ast.Assign, ast.AnnAssign))]
    targets = [target for line in assigned for target in getattr(line, "targets", [getattr(line, "target", None)])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def value(text: str) -> Any:
    """A parameter's value: a Python literal where `text` is one (20, 0.5, True, "[1, 2]"), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def plan(notebooks: list[Path], given: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters of each notebook: those of `given` and `defaults` that it declares.

    Raises:
        UserError: a name in `given` that none of the notebooks declares. papermill would only warn.
    """
    declared = [parameter_names(notebook) for notebook in notebooks]
    known = set().union(*declared)
    for name in given:
        if name not in known:
            raise UserError(f"no parameter {name!r}: these notebooks have {', '.join(sorted(known)) or 'none'}")
    wanted = {**defaults, **given}
    return [{name: content for name, content in wanted.items() if name in names} for names in declared]


def execute(notebook: Path, copy: Path, parameters: dict[str, Any]) -> None:
    """Run one notebook, in its own folder, into `copy`. Raises Stopped where a cell fails or the kernel dies.

    While it runs, the copy grows under a passing name; a notebook that stops on the way leaves what it has.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    running = copy.with_name(f".{copy.stem}.part.ipynb")
    try:
        papermill.execute_notebook(
            notebook, running, parameters, kernel_name="python3", language="python", progress_bar=False, cwd=notebook.parent,
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel: what matters is in the notebook
        )
    except papermill.PapermillExecutionError as error:
        raise Stopped(f"cell {error.exec_count}: {error.ename}: {reason(ValueError(error.evalue))}") from None
    except DeadKernelError:
        raise Stopped("its kernel died: stopped from outside, or out of memory") from None
    finally:
        if running.exists():
            os.replace(running, copy)


def run(args: argparse.Namespace) -> int:
    """Execute the notebooks one by one, a line each; the first that fails ends the series with exit code 1."""
    notebooks = select(args.notebooks)
    given = {name: value(text) for name, text in args.parameters}
    parameters = plan(notebooks, given, {"SCALE": args.scale, "SEED": args.seed})
    copies = runs_dir() / "notebooks"
    try:
        copies.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {copies}: {reason(error)}") from None
    if args.scale == "tiny":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to fetch: everything ships
    for library in ("papermill", "traitlets", "asyncio"):  # each failure is told once, by this command
        logging.getLogger(library).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a kernel would be left behind

    began = time.time()
    for number, (notebook, chosen) in enumerate(zip(notebooks, parameters), start=1):
        print(f"[{number}/{len(notebooks)}] {notebook.stem:<28}", end=" ", flush=True)
        start = time.monotonic()
        try:
            execute(notebook, copies / notebook.name, chosen)
        except Stopped as stopped:
            print(f"{_minutes(start)}  failed", flush=True)
            print(f"snapgen: {notebook.stem}, {stopped} (see {copies / notebook.name})", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{_minutes(start)}  interrupted", flush=True)
            raise
        print(f"{_minutes(start)}  ok", flush=True)

    grid = copies / "grid.png"
    if grid.exists() and grid.stat().st_mtime >= began - 1:  # not one from an earlier run
        print(f"pictures: {_short(grid)}")
    print(f"executed notebooks: {_short(copies)}")
    return 0


def _minutes(start: float) -> str:
    return f"{(time.monotonic() - start) / 60:5.1f} min"


def _short(path: Path) -> str:
    """`path` from the repository's root on, which is where most people stand."""
    return str(path.relative_to(home())) if Path.cwd() == home() else str(path)
