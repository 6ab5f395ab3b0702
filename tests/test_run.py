"""`snapgen run` on small notebooks written here."""

import json
import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from snapgen_core.cli import main
from snapgen_core.commands.run import parameter_names, plan, value
from snapgen_core.errors import UserError

PARAMETERS = 'SCALE = "tiny"  # size\nSEED: int = 0\nTRAIN = "demo"\n'


def write(path, *sources, tagged=PARAMETERS):
    cells = [new_code_cell(tagged, metadata={"tags": ["parameters"]})] if tagged else []
    nbformat.write(new_notebook(cells=[*cells, *map(new_code_cell, sources)]), str(path))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    return tmp_path


def printed(path):
    cells = nbformat.read(str(path), as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_runs_the_series_with_scale_and_seed(home, capfd):
    write(home / "notebooks" / "00_first.ipynb", "print(SCALE, SEED, TRAIN)")
    write(home / "notebooks" / "01_second.ipynb", "open('../exports/runs/notebooks/grid.png', 'w')", "print('end')", tagged="TRAIN = 1")
    assert main(["run", "--seed", "7", "-p", "TRAIN", "full"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert len(lines) == 4 and err == ""
    assert lines[0].startswith("[1/2] 00_first") and lines[0].endswith("min  ok")
    assert lines[1].startswith("[2/2] 01_second") and lines[1].endswith("min  ok")
    assert "grid.png" in lines[2] and str(home / "exports" / "runs" / "notebooks") in lines[3]
    assert printed(home / "exports" / "runs" / "notebooks" / "00_first.ipynb") == "tiny 7 full\n"
    assert "end" in printed(home / "exports" / "runs" / "notebooks" / "01_second.ipynb")


def test_an_old_grid_is_not_claimed(home, capfd):
    write(home / "notebooks" / "00_first.ipynb", "1 + 1")
    grid = home / "exports" / "runs" / "notebooks" / "grid.png"
    grid.parent.mkdir(parents=True)
    grid.write_text("old")
    os.utime(grid, (1e9, 1e9))
    assert main(["run", "00"]) == 0
    assert "grid.png" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("source", "told"),
    [("raise ValueError('no luck\\nat all')", "cell 3: ValueError: no luck"), ("import os; os._exit(1)", "kernel died")],
)
def test_a_failure_is_told_in_one_line_and_kept(home, capfd, source, told):
    write(home / "notebooks" / "00_bad.ipynb", source)
    write(home / "notebooks" / "01_after.ipynb", "print(1)")
    assert main(["run"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-1].endswith("failed")
    (line,) = [line for line in err.splitlines() if line.startswith("snapgen: ")]  # a dying kernel may have its own last words
    assert "00_bad" in line and told in line and "Traceback" not in err
    assert os.listdir(home / "exports" / "runs" / "notebooks") == ["00_bad.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "TRIAN", "full"], "no parameter 'TRIAN': these notebooks have SCALE, SEED, TRAIN"),
        (["07"], "no notebook '07': choose among 00_first"),
        (["--scale", "huge"], "tiny, small, paper"),
        (["00", "-p", "TRAIN"], "expected 2 arguments"),
    ],
)
def test_wrong_arguments_run_nothing(home, capfd, arguments, told):
    write(home / "notebooks" / "00_first.ipynb", "print(1)")
    assert main(["run", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err
    assert not (home / "exports").exists()


def test_broken_notebooks_run_nothing(home, capfd):
    for content in ("", "{}", "[]", '{"cells": 3}', "\x00"):
        (home / "notebooks" / "00_first.ipynb").write_text(content)
        assert main(["run"]) == 2
        assert capfd.readouterr().err.count("\n") == 1
    write(home / "notebooks" / "00_first.ipynb", tagged="SCALE = = 3")
    assert main(["run"]) == 2


def test_no_notebooks_at_all(home, capfd):
    assert main(["run"]) == 2
    assert "no notebooks in" in capfd.readouterr().err


def test_a_file_anywhere_can_be_named(home, tmp_path, capfd):
    write(home / "notebooks" / "00_first.ipynb")
    mine = write(tmp_path / "mine.ipynb", "print(SEED)")
    assert main(["run", str(mine), "--seed", "3"]) == 0
    assert printed(home / "exports" / "runs" / "notebooks" / "mine.ipynb") == "3\n"


def test_parameters_are_found_as_papermill_finds_them(tmp_path):
    import papermill

    path = write(tmp_path / "a.ipynb", "OTHER = 1")
    notebook = nbformat.read(str(path), as_version=4)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, str(path))
    assert parameter_names(path) == set(papermill.inspect_notebook(str(path))) == {"SCALE", "SEED", "TRAIN"}
    assert parameter_names(write(tmp_path / "b.ipynb", "OTHER = 1", tagged=None)) == set()


def test_every_notebook_gets_what_it_declares(tmp_path):
    a = write(tmp_path / "a.ipynb", tagged="SCALE = 1\nSTEPS = 2")
    b = write(tmp_path / "b.ipynb", tagged="SCALE = 1\nSEED = 2")
    assert plan([a, b], {"STEPS": 5}, {"SCALE": "tiny", "SEED": 0}) == [{"SCALE": "tiny", "STEPS": 5}, {"SCALE": "tiny", "SEED": 0}]
    assert plan([b], {"SEED": 4}, {"SCALE": "tiny", "SEED": 0}) == [{"SCALE": "tiny", "SEED": 4}]  # -p wins
    with pytest.raises(UserError, match="STEPS"):
        plan([b], {"STEPS": 5}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20", 20), ("0.5", 0.5), ("True", True), ("None", None), ("[1, 'a']", [1, "a"]), ("full", "full"), ("a b", "a b"), ("", ""), ("007x", "007x"), ("os.remove('x')", "os.remove('x')")],
)
def test_values_are_literals_or_text(text, expected):
    assert value(text) == expected and type(value(text)) is type(expected)
    json.dumps(value(text))
