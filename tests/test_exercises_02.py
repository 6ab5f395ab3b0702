"""Notebook 02's checkers: right answers pass, each likely mistake gets its own hint, and nothing crashes them."""

from dataclasses import replace

import pytest

from snapgen_core.exercises import check_decoder_design, check_reach, check_residual
from snapgen_core.scales import DECODER_PRESETS

PAPER = DECODER_PRESETS["paper"]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c: ..., "no answer so far"),
        (lambda c: 1 / 0, "ZeroDivisionError"),
        (lambda c: 9 * c + c * c + c, "one of its two"),
        (lambda c: 2 * (9 * c * c + c), "dense"),
        (lambda c: 2 * (9 * c + c * c), "have a bias"),
        (lambda c: 2 * (9 * c + c + c * c + c), "no bias"),
        (lambda c: 5, "it is not 5"),
    ],
)
def test_residual_wrong(answer, hint):
    verdict = check_residual(answer)
    assert not verdict and hint in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda b: ..., "no answer so far"),
        (lambda b: 1 + 2 * b, "How many of the input"),
        (lambda b: (1 + 2 * b) // 2, "whole rows"),
        (lambda b: 2 * b if b else 1, "convolves, too"),
        (lambda b: 40, "it is not 40"),
    ],
)
def test_reach_wrong(answer, hint):
    verdict = check_reach(answer)
    assert not verdict and hint in repr(verdict)


@pytest.mark.parametrize(
    ("design", "hint"),
    [
        (..., "start from replace"),
        (PAPER, "too many parameters"),
        (replace(PAPER, channels=(224, 160, 96, 96)), "too many MACs"),
        (replace(PAPER, channels=(128, 64, 32, 32)), "too few MACs"),
        (replace(PAPER, norm="none"), "channels and blocks only"),
        (replace(PAPER, channels=(224, 160, 96), blocks=(2, 2, 2)), "it takes four"),
        (replace(PAPER, channels=(225, 160, 96, 64)), "this is no decoder"),
    ],
)
def test_design_wrong(design, hint):
    verdict = check_decoder_design(design)
    assert not verdict and hint in repr(verdict)


def test_right_answers():
    assert check_residual(lambda c: 2 * (9 * c + c * c + c))
    assert check_reach(lambda blocks: blocks + 1)
    assert check_decoder_design(replace(PAPER, channels=(224, 160, 96, 64)))
