"""The checkers of notebook 00: they accept right answers, and tell wrong ones why."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from snapgen_core.evaluate import judge
from snapgen_core.exercises import check_fusion, check_judge, check_numbers
from snapgen_core.text import fuse

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"


def solutions() -> list[str]:
    """The code of the notebook's folded solutions."""
    cells = nbformat.read(str(NOTEBOOK), as_version=4).cells
    folded = [cell.source for cell in cells if cell.cell_type == "markdown" and "<details>" in cell.source]
    return [code for text in folded for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize(("number", "name", "check"), [(0, "numbers", check_numbers), (1, "fuse_by_hand", check_fusion), (2, "judge_by_hand", check_judge)])
def test_the_folded_solutions_are_right(number, name, check):
    scope = {"torch": torch}
    exec(solutions()[number], scope)
    verdict = check(scope[name])
    assert verdict, verdict


@pytest.mark.parametrize("check", [check_numbers, check_fusion, check_judge])
def test_no_answer_and_a_crash_are_not_right(check):
    for answer in (lambda *a: ..., lambda *a: None):
        assert not check(answer) and "no answer" in check(answer).message
    assert not check(lambda *a: 1 / 0) and "ZeroDivisionError" in check(lambda *a: 1 / 0).message


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s: (s * s, 2 * s * s), "three colours"),
        (lambda s: (3 * s * s, s * s // 64), "sixteen channels"),
        (lambda s: (3 * s * s, 2 * s * s), "height and for the width"),
        (lambda s: (3 * s * s, 16 * s * s), "fewer positions"),
        (lambda s: (3 * s * s, 3 * s * s // 64), "not the three colours"),
        (lambda s: (12288, 1024), "does not hold 12288"),  # right at 64 pixels alone
        (lambda s: 3 * s * s, "two numbers"),
        (lambda s: (3 * s * s, ...), "two numbers"),
    ],
)
def test_numbers(answer, hint):
    verdict = check_numbers(answer)
    assert not verdict and hint in verdict.message


def _padded(parts, width, at_end=True):
    clip = torch.cat(parts, 2)
    zeros = clip.new_zeros(*clip.shape[:2], width - clip.shape[2])
    return torch.cat([clip, zeros] if at_end else [zeros, clip], 2)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda a, b, lm: torch.cat([_padded([b, a], lm.shape[2]), lm], 1), "CLIP-L comes before"),
        (lambda a, b, lm: torch.cat([lm, _padded([a, b], lm.shape[2])], 1), "come after"),
        (lambda a, b, lm: torch.cat([_padded([a, b], lm.shape[2], at_end=False), lm], 1), "zeros come last"),
        (lambda a, b, lm: torch.cat([_padded([a, b], lm.shape[2]) + 1e-3, lm], 1), "CLIPs' part is not"),
        (lambda a, b, lm: torch.cat([_padded([a, b], lm.shape[2]), 0.9 * lm], 1), "unchanged"),
        (lambda a, b, lm: torch.cat([a, b, lm], 2), "stopped with RuntimeError"),
        (lambda a, b, lm: lm, "comes [2, 10, 12], not [2, 6, 12]"),
        (lambda a, b, lm: torch.zeros_like(fuse(a, b, lm)), "unchanged"),
    ],
)
def test_fusion(answer, hint):
    verdict = check_fusion(answer)
    assert not verdict and hint in verdict.message, verdict


def test_the_librarys_judge_is_right():
    assert check_judge(judge)


def _careless(prompt, detections, exact=True, low=0.3, high=0.5, colours=True, best=True):
    """A judge with one rule or another left out."""
    for wanted in prompt.wanted:
        found = [d for d in detections if d.name == wanted.name and d.score > (high if prompt.task == "counting" else low)]
        if len(found) < wanted.count or (exact and prompt.task == "counting" and len(found) != wanted.count):
            return False
        chosen = sorted(found, key=lambda d: -d.score)[: wanted.count] if best else found
        if colours and wanted.colour and not any(d.colour == wanted.colour for d in chosen):
            return False
    return True


def test_the_careless_judge_is_right_with_all_rules():
    assert check_judge(_careless)


@pytest.mark.parametrize("left_out", [{"exact": False}, {"low": 0.0}, {"low": 0.5}, {"high": 0.3}, {"high": 0.7}, {"colours": False}, {"best": False}])
def test_a_judge_without_one_rule_is_caught(left_out):
    verdict = check_judge(lambda prompt, detections: _careless(prompt, detections, **left_out))
    assert not verdict and "the rules say" in verdict.message


@pytest.mark.parametrize("answer", [lambda p, d: True, lambda p, d: False, lambda p, d: len(d) == sum(w.count for w in p.wanted)])
def test_a_judge_that_does_not_look_is_caught(answer):
    assert not check_judge(answer)
