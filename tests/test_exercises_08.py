"""Notebook 08's checkers: right answers pass, each likely mistake gets its own hint."""

import pytest
import torch

from snapgen_core.exercises import check_admit, check_arc, check_calls
from snapgen_core.studio.engine import on_sphere


@pytest.mark.parametrize(("answer", "hint"), [(..., "no answer"), ("a", "one number"), (28, "one picture without"), (56, "one picture"), (84, "twice a step"), (12, "distilled student"), (100, "not that many")])
def test_calls(answer, hint):
    verdict = check_calls(answer)
    assert not verdict and hint in verdict.message, verdict


def uneven(a, b, part):
    return on_sphere(a, b, part**2)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b, part: ..., "no answer"),
        (lambda a, b, part: 1.0, "one noise"),
        (lambda a, b, part: on_sphere(b, a, part), "begins at a"),
        (torch.lerp, "straight line"),
        (lambda a, b, part: on_sphere(a, b, part) * (1 + part * (1 - part)), "leaves the sphere"),
        (uneven, "even speed"),
    ],
)
def test_arc(answer, hint):
    verdict = check_arc(answer)
    assert not verdict and hint in verdict.message, verdict


def admit(running, waiting, task):
    if not task or waiting:
        return running, waiting, False
    return (running, task, True) if running else (task, None, True)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: ..., "no answer"),
        (lambda *given: True, "three things"),
        (lambda running, waiting, task: (task, None, True), "the next one waits"),
        (lambda running, waiting, task: (running, task, True) if running else (task, None, True), "the third is refused"),
        (lambda running, waiting, task: (running, waiting, False) if waiting else (running, task, True) if running else (task, None, True), "empty prompt"),
    ],
)
def test_admit(answer, hint):
    verdict = check_admit(answer)
    assert not verdict and hint in verdict.message, verdict


def test_right_answers():
    assert check_calls(168) and check_arc(on_sphere) and check_admit(admit)
