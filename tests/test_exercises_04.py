"""Notebook 04's checkers: right answers pass, each likely mistake gets its own hint."""

import math

import pytest
import torch

from snapgen_core.distill import task_weight
from snapgen_core.exercises import check_binned_ratio, check_half_weight, check_teachers_share


def test_where_data_and_teacher_weigh_the_same():
    t = torch.linspace(0.001, 0.499, 200_001, dtype=torch.float64)
    lower = t[(task_weight(t) - 0.5).abs().argmin()].item()
    assert check_half_weight(lower) and check_half_weight(f"{lower:.3f}")
    assert "by symmetry" in check_half_weight(lower).message
    without = 1 / (1 + math.exp(math.sqrt(2 * math.log(2))))
    density = t[(4 / math.sqrt(2 * math.pi) * task_weight(t) - 0.5).abs().argmin()].item()
    for value, hint in ((1 - lower, "the upper one"), (without, "t (1 - t)"), (density, "over its maximum"), (0.4, "not there"), ("a", "a number"), (7, "not there"), (math.nan, "not there")):
        verdict = check_half_weight(value)
        assert not verdict and hint in verdict.message, (value, verdict)
    assert "no answer so far" in check_half_weight(...).message


def ratio(task, kd):
    return (task / kd).detach()


def shares(t):
    return (task_weight(t) < 0.5).float().mean().item(), (1 - task_weight(t)).mean().item()


def test_how_much_the_teacher_says():
    drawn = torch.sigmoid(torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)))
    share, weight = shares(drawn)
    assert check_teachers_share(share, weight) and check_teachers_share(f"{share:.2f}", torch.tensor(weight))
    mistakes = [
        (shares(torch.linspace(0, 1, 100_001)), "drawn evenly"),
        (shares(3 * drawn / (1 + 2 * drawn)), "before the shift"),
        ((1 - share, 1 - weight), "for the teacher"),
        ((share, 0.5), "the weight is not"),
        ((0.5, weight), "the share is not"),
        ((0.9, 0.9), "not these"),
        ((math.nan, math.nan), "not these"),
        (("a", 1), "two numbers"),
        ((..., weight), "no answer so far"),
    ]
    for answer, hint in mistakes:
        verdict = check_teachers_share(*answer)
        assert not verdict and hint in verdict.message, (answer, verdict)


def binned(task, kd, t, bins, of_means=True, detach=True):
    places = (t * bins).long()
    out = torch.stack([task[places == p].mean() / kd[places == p].mean() if of_means else (task / kd)[places == p].mean() for p in places])
    return out.detach() if detach else out


BINNED = [
    (lambda task, kd, t, bins: ..., "no answer so far"),
    (lambda task, kd, t, bins: task.mean(), "for each sample"),
    (lambda task, kd, t, bins: ratio(task, kd), "own ratio"),
    (lambda task, kd, t, bins: ratio(task.mean(), kd.mean()).expand(8), "bin by bin"),
    (lambda task, kd, t, bins: binned(task, kd, t, bins, of_means=False), "ratio of the means"),
    (lambda task, kd, t, bins: binned(task, kd, t, bins + 1), "Which bin"),
    (lambda task, kd, t, bins: binned(task, kd, t, bins, detach=False), "detach"),
]


@pytest.mark.parametrize(("answer", "hint"), BINNED, ids=[hint for _, hint in BINNED])
def test_mistakes_in_the_bins(answer, hint):
    verdict = check_binned_ratio(answer)
    assert not verdict and hint in verdict.message, verdict


def test_the_bins():
    assert check_binned_ratio(binned)
