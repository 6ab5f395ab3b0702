"""environment.yml, pyproject.toml, the Makefile and `snapgen doctor` tell the same story."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from snapgen_core.commands.doctor import TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def contradictions(conda: dict, project: dict) -> list[str]:
    """Where a conda environment and a pyproject's [project] table disagree."""
    found = []
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    pip = next((entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)), [])

    python = next((entry.partition("=")[2].strip("=") for entry in plain if entry.startswith("python=")), None)
    floor = re.fullmatch(r">=([\d.]+)", project["requires-python"])[1]
    if python != floor:
        found.append(f"python {python} against {floor}")

    package = next((entry for entry in pip if entry.startswith("-e ")), "")
    extras = re.fullmatch(r"-e \.(?:\[([\w,]+)\])?", package)
    if not extras:
        found.append("pip does not install this folder")
    elif set((extras[1] or "").split(",")) - {""} - set(project["optional-dependencies"]):
        found.append(f"unknown extra in {package}")

    declared = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    bounds = {Requirement(line).name: Requirement(line).specifier for line in declared}
    named = [entry for entry in pip if not entry.startswith("-e ")]
    named += [entry.replace("=", "==", 1) for entry in plain if "=" in entry and not entry.startswith("python=")]
    for entry in map(Requirement, named):
        pins = [pin.version for pin in entry.specifier if pin.operator == "=="]
        if entry.name not in bounds:
            found.append(f"{entry.name} is not a dependency")
        elif not pins or not bounds[entry.name].contains(pins[0]):
            found.append(f"{entry} is outside {bounds[entry.name]}")
    return found


def test_conda_and_pip_install_the_same():
    assert contradictions(CONDA, PROJECT) == []


@pytest.mark.parametrize(
    ("dependencies", "complaint"),
    [
        (["python=3.10", {"pip": ["-e .[all]"]}], "python 3.10 against 3.11"),
        (["python=3.11", {"pip": ["-e .[everything]"]}], "unknown extra"),
        (["python=3.11", {"pip": ["snapgen_core"]}], "does not install this folder"),
        (["python=3.11", {"pip": ["torch==2.1.0", "-e .[all]"]}], "torch==2.1.0 is outside"),
        (["python=3.11", "numpy=1.26", {"pip": ["-e .[all]"]}], "numpy==1.26 is outside"),
        (["python=3.11", {"pip": ["tensorflow==2.0", "-e ."]}], "tensorflow is not a dependency"),
        (["python=3.11"], "does not install this folder"),
    ],
)
def test_a_contradiction_is_noticed(dependencies, complaint):
    assert any(complaint in line for line in contradictions({"dependencies": dependencies}, PROJECT))


def test_every_dependency_has_a_floor_and_a_cap():
    for line in PROJECT["dependencies"]:
        operators = {bound.operator for bound in Requirement(line).specifier}
        assert operators & {">=", "=="}, f"{line} has no lower bound"
        assert operators & {"<", "=="} or Requirement(line).name == "packaging", f"{line} has no upper bound"  # calendar versions


def test_tested_versions_are_allowed():
    bounds = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    assert set(TESTED) == set(bounds)
    for name, version in TESTED.items():
        assert SpecifierSet(str(bounds[name])).contains(version), name


def test_all_does_not_bring_torchvision():
    extras = PROJECT["optional-dependencies"]
    inside = re.fullmatch(r"snapgen_core\[([\w,]+)\]", extras["all"][0])[1].split(",")
    assert set(inside) == set(extras) - {"all", "metrics", "coreai"}  # these two are not to be had everywhere
    assert not any("torchvision" in line or "lpips" in line for name in inside for line in extras[name])


def test_make_and_conda_pin_the_same_torch():
    pin = next(entry for entry in CONDA["dependencies"][-1]["pip"] if entry.startswith("torch"))
    assert pin in (ROOT / "Makefile").read_text()
    assert pin == f"torch=={TESTED['torch']}"


@pytest.mark.parametrize("target", ["run", "test", "lab", "checkpoints"])
def test_make_sets_up_before_it_works(target):
    """On a fresh checkout the first command creates .venv and installs torch with the package in one pip call."""
    clean = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "TORCH")}
    dry = subprocess.run(["make", "-n", target, "VENV=.venv-not-there"], cwd=ROOT, capture_output=True, text=True, env=clean)
    assert dry.returncode == 0, dry.stderr
    assert "-m venv .venv-not-there" in dry.stdout
    assert re.search(r'pip install .*torch==[\d.]+ -e "\.\[all\]"', dry.stdout)


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()
