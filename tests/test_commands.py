"""`snapgen train`, `evaluate` and `prepare`: what they hand on and what they write."""

import json
import re
import shlex
from pathlib import Path

import pytest

import snapgen_core
import snapgen_core.evaluate
import snapgen_core.train
from snapgen_core import stages
from snapgen_core.cli import main
from snapgen_core.commands.evaluate import rows
from snapgen_core.errors import UserError

FIGURES = {"overall": {"score": 0.6123, "low": 0.5, "high": 0.75, "n": 12}, "tasks": {"counting": {"score": 0.25, "low": 0, "high": 1, "n": 2}}, "settings": {"steps": 3}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The library's entry points, replaced by a record of what they were given."""
    record = []
    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, lambda scale, seed, name=name: (name, scale, seed))
    monkeypatch.setattr(snapgen_core.train, "train", lambda *a, **k: record.append(("train", *a, k)) or a[1] / "model.safetensors")
    monkeypatch.setattr(snapgen_core.train, "ship", lambda *a: record.append(("ship", *a)) or [Path("data/base")])
    monkeypatch.setattr(snapgen_core.evaluate, "evaluate_stage", lambda *a: record.append(("evaluate", *a)) or FIGURES)
    return record


def test_train_hands_on_its_budget(home, calls, capfd):
    assert main(["train", "text", "--minutes", "1.5", "--seed", "4"]) == 0
    folder = home / "exports" / "runs" / "tiny" / "text"
    assert calls == [("train", ("text", "tiny", 4), folder, {"steps": None, "minutes": 1.5, "warm_start": False, "compile": False, "score": True})]
    assert folder.is_dir() and str(folder / "weights") in capfd.readouterr().out


def test_train_starts_warm_when_asked(home, calls):
    assert main(["train", "base", "--steps", "7", "--warm-start"]) == 0
    assert calls[0][-1] == {"steps": 7, "minutes": None, "warm_start": True, "compile": False, "score": True}


def test_train_ships_only_when_asked(home, calls, capfd):
    assert main(["train", "base", "--steps", "7", "--run-dir", "mine", "--ship"]) == 0
    assert [call[0] for call in calls] == ["train", "ship"]
    assert calls[1][1] == Path("mine") and calls[0][-1] == {"steps": 7, "minutes": None, "warm_start": False, "compile": False, "score": True}
    assert "shipped data/base" in capfd.readouterr().out


def test_a_run_that_cannot_go_on_is_told(home, calls, monkeypatch, capfd):
    def refuse(*_, **__):
        raise UserError("the folder holds\nanother run")

    monkeypatch.setattr(snapgen_core.train, "train", refuse)
    assert main(["train", "base", "--ship"]) == 2
    assert capfd.readouterr().err == "snapgen: the folder holds another run\n"
    assert calls == []  # nothing shipped


def test_evaluate_prints_and_writes_the_same_figures(home, calls, capfd):
    arguments = ["evaluate", "--images", "4", "--steps", "3", "--guidance", "2", "--seed", "9", "--json", "figures.json"]
    assert main(arguments) == 0
    assert calls == [("evaluate", "tiny", "base", 4, 9, 3, 2.0, None, "full", False, None, None)]
    assert capfd.readouterr().out.splitlines()[0].split(maxsplit=1) == ["overall", "0.61 [0.50, 0.75] n=12"]
    written = json.loads((home / "figures.json").read_text())
    assert {name: written[name] for name in FIGURES} == FIGURES
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written["date"])
    assert written["command"] == shlex.join(["snapgen", *arguments]) and "commit" in written


def test_evaluate_tells_which_training_made_a_checkpoint(home, calls):
    training = {"command": "snapgen train kd", "commit": "abc", "steps": 7, "samples": 448, "minutes": 0.1, "device": "cpu"}
    weights = home / "run" / "weights" / "kd"
    weights.mkdir(parents=True)
    (home / "run" / "result.json").write_text(json.dumps(training | {"losses": [1.0]}))
    assert main(["evaluate", "--checkpoint", str(weights), "--json", "figures.json"]) == 0
    assert json.loads((home / "figures.json").read_text())["training"] == training
    (home / "run" / "result.json").unlink()
    assert main(["evaluate", "--checkpoint", str(weights), "--json", "figures.json"]) == 0
    assert json.loads((home / "figures.json").read_text())["training"] == {}


def test_only_students_are_squeezed(home, calls, capfd):
    assert main(["evaluate", "--bits", "4.3"]) == 0 and calls[-1][-2] == 4.3
    assert main(["evaluate", "--stage", "teacher", "--bits", "4.3"]) == 2
    assert "not the teacher" in capfd.readouterr().err


def test_the_teacher_helps_students_only(home, calls, capfd):
    assert main(["evaluate", "--relay", "0.7,.85"]) == 0 and calls[-1][-1] == (0.7, 0.85)
    assert main(["evaluate", "--stage", "turbo", "--relay", "0.7,0.85"]) == 2
    assert "not in the turbo's" in capfd.readouterr().err
    for text in ("0.7", "0.85,0.7", "0,1.1", "a,b", "0.5,nan", "-0.1,1", "0,0.5,1"):
        assert main(["evaluate", f"--relay={text}"]) == 2
        assert "are not two noise levels" in capfd.readouterr().err


def test_a_failed_evaluation_leaves_the_old_figures(home, monkeypatch, capfd):
    def fail(*_):
        raise UserError("no detector")

    (home / "figures.json").write_text("old")
    monkeypatch.setattr(snapgen_core.evaluate, "evaluate_stage", fail)
    assert main(["evaluate", "--json", "figures.json"]) == 2
    assert (home / "figures.json").read_text() == "old" and [p.name for p in home.iterdir() if p.name.startswith(".")] == []


def test_rows_flatten_what_is_nested():
    assert dict(rows({"a": {"b": {"c": 1}}, "d": 0.123456, "e": None})) == {"a.b.c": "1", "d": "0.1235", "e": "None"}
    assert list(rows({"outcomes": {"colors": "01"}, "a": 1})) == [("a", "1")]
    assert dict(rows(FIGURES))["tasks.counting"] == "0.25 [0.00, 1.00] n=2"


def test_prepare_asks_for_the_training_set(home, monkeypatch, capfd):
    from snapgen_core.stages import base

    asked = []

    class Set:
        def __init__(self, *arguments):
            asked.append(arguments)
            self.scenes, self.embeddings = type("Scenes", (), {"captions": ["a", "a", "b"]}), {"a": 0, "b": 1}

    monkeypatch.setattr(base, "TrainingSet", Set)
    assert main(["prepare", "--images", "3", "--seed", "2"]) == 0
    assert main(["prepare"]) == 0
    assert asked == [("tiny", 2, 3), ("tiny", 0, base.SCENES)]
    assert "3 scenes and 2 captions" in capfd.readouterr().out
