"""`snapgen demo`: the studio of notebook 08 in a browser, for several visitors of this machine."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError, reason
from ..paths import notebooks_dir
from .common import quiet_libraries

NOTEBOOK, TAG = "08_generate.ipynb", "studio"  # its cells with this tag are the page


def page(scale: str) -> dict:
    """Notebook 08 without its lessons: the cells with the tag, after one that says the scale. Raises UserError."""
    path = notebooks_dir() / NOTEBOOK
    try:
        notebook = json.loads(path.read_text("utf-8"))
        cells = [cell for cell in notebook["cells"] if TAG in cell["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if not cells:
        raise UserError(f"{path} has no cell with the tag {TAG!r}")
    first = {"cell_type": "code", "id": "scale", "metadata": {}, "execution_count": None, "outputs": [], "source": f"SCALE = {scale!r}"}
    kernel = {name: notebook["metadata"][name] for name in ("kernelspec", "language_info") if name in notebook["metadata"]}
    return notebook | {"metadata": kernel, "cells": [first, *({**cell, "outputs": []} for cell in cells)]}


def check_port(port: int) -> None:
    """Raises UserError where something else listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used: {reason(error)}; choose another with --port") from None


def demo(args: argparse.Namespace) -> int:
    """Load the models once, start the page's process beside them, and serve until it ends or Ctrl-C comes."""
    if find_spec("voila") is None:
        raise UserError('the page needs Voila: pip install "snapgen_core[notebooks]"')
    check_port(args.port)
    made = page(args.scale)
    quiet_libraries(args.scale)

    from ..studio.engine import Engine
    from ..studio.pages import VISITORS
    from ..studio.shared import Server

    engine = Engine(args.scale)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the page's process ends with this one
    with Server(engine.run, engine.stages) as server, tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "SnapGen studio.ipynb"
        notebook.write_text(json.dumps(made), "utf-8")
        environment = os.environ | server.environment | {VISITORS: str(args.visitors)}
        process = subprocess.Popen([sys.executable, "-m", "snapgen_core.studio.pages", str(notebook), str(args.port), args.theme], env=environment)
        try:
            while process.poll() is None and not answers(args.port):
                time.sleep(0.2)
            if process.poll() is None:
                print(f"the studio is at http://localhost:{args.port}/ (this machine only, {args.visitors} visitors at once); Ctrl-C ends it", flush=True)
            return process.wait()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
