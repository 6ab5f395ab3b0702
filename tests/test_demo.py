"""`snapgen demo` without a browser: what the page is made of, and what is refused at the door."""

import json
import socket
from types import SimpleNamespace

import pytest

from snapgen_core.cli import main
from snapgen_core.commands import demo
from snapgen_core.errors import UserError


def test_the_page_is_the_notebooks_studio_and_nothing_else():
    made = demo.page("tiny")
    sources = ["".join(cell["source"]) for cell in made["cells"]]
    assert sources[0] == "SCALE = 'tiny'" and len(sources) == 2 and "studio(SCALE)" in sources[1]
    assert all(cell["outputs"] == [] for cell in made["cells"]) and set(made["metadata"]) <= {"kernelspec", "language_info"}


def test_without_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "notebooks_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        demo.page("tiny")
    (tmp_path / demo.NOTEBOOK).write_text(json.dumps({"cells": [], "metadata": {}}))
    with pytest.raises(UserError, match="no cell with the tag"):
        demo.page("tiny")


def test_wrong_input_is_one_line(capfd, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--port", str(taken.getsockname()[1])]) == 2
    assert main(["demo", "--port", "0"]) == main(["demo", "--visitors", "none"]) == main(["demo", "--theme", "pink"]) == 2
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 5 and "choose another with --port" in lines[0] and "pip install" in lines[-1]


def test_a_full_studio_says_so(monkeypatch):
    """And another site's page does not get in."""
    pages = pytest.importorskip("snapgen_core.studio.pages")
    monkeypatch.setenv(pages.VISITORS, "2")
    written = []

    def visit(taken, **headers):
        handler = SimpleNamespace(request=SimpleNamespace(headers=headers), kernel_manager=SimpleNamespace(taken=lambda: taken), set_status=written.append, set_header=lambda *header: None, write=written.append)
        pages.at_the_door(handler, None, "")

    visit(1)
    assert written == []
    with pytest.raises(pages.Finish):
        visit(2)
    assert written[0] == 503 and "2 of 2 visitors" in written[1]
    with pytest.raises(pages.HTTPError, match="403"):
        visit(0, **{"Sec-Fetch-Site": "cross-site"})
