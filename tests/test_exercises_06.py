"""Notebook 06's checkers: right answers pass, each likely mistake gets its own hint."""

import pytest
import torch

from snapgen_core.exercises import check_megabytes, check_nearest, check_safe_rms

MB = 379 * 4.3 / 8


@pytest.mark.parametrize(
    ("answer", "hint"),
    [(..., "no answer"), ("a", "one number"), (8 * MB, "megabits"), (1e6 * MB, "are bytes"), (758, "in 16 bits"), (MB * 1e6 / 2**20, "mebibytes"), (300, "not that many"), (float("nan"), "not that many")],
)
def test_megabytes(answer, hint):
    verdict = check_megabytes(answer)
    assert not verdict and hint in verdict.message, verdict


def nearest(weights, palette):
    return torch.searchsorted((palette[1:] + palette[:-1]) / 2, weights)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda w, p: ..., "no answer"),
        (lambda w, p: 3, "for each weight"),
        (lambda w, p: p[nearest(w, p)], "whole numbers"),
        (lambda w, p: torch.searchsorted(p, w), "0 to"),
        (lambda w, p: torch.searchsorted(p, w).clamp(max=len(p) - 1), "next larger"),
        (lambda w, p: torch.zeros(len(w), dtype=torch.long), "not their nearest"),
    ],
)
def test_nearest(answer, hint):
    verdict = check_nearest(answer)
    assert not verdict and hint in verdict.message, verdict


def safe(x):
    largest = x.abs().amax(dim=1, keepdim=True).clamp(min=1)
    return largest * (x / largest).square().mean(dim=1, keepdim=True).sqrt()


def divided(x):
    largest = x.abs().amax(dim=1, keepdim=True)
    return largest * (x / largest).square().mean(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x: ..., "no answer"),
        (lambda x: safe(x)[:, 0], "[B, 1]"),
        (lambda x: x.float().square().mean(dim=1, keepdim=True).sqrt().half(), "leaves 16 bits"),
        (lambda x: safe(x).float(), "leaves 16 bits"),
        (lambda x: x.square().mean(dim=1, keepdim=True).sqrt(), "overflows"),
        (divided, "row of zeros"),
        (lambda x: x.abs().amax(dim=1, keepdim=True) / 2, "the root of the mean"),
    ],
)
def test_safe_rms(answer, hint):
    verdict = check_safe_rms(answer)
    assert not verdict and hint in verdict.message, verdict


def test_right_answers():
    assert check_megabytes(MB) and check_megabytes("204") and check_nearest(nearest) and check_safe_rms(safe)
