"""Notebook 04's checkers: right answers pass, each likely mistake gets its own hint."""

import math

import pytest
import torch

from snapgen_core.distill import scaled, task_weight
from snapgen_core.exercises import check_binned_ratio, check_half_weight, check_scaled


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


SCALED = [
    (lambda task, kd, t: None, "no answer so far"),
    (lambda task, kd, t: 1 / 0, "ZeroDivisionError"),
    (lambda task, kd, t: task, "one number"),
    (lambda task, kd, t: (task_weight(t) * task + (1 - task_weight(t)) * kd).mean(), "ratio of the losses is missing"),
    (lambda task, kd, t: (task_weight(t) * task + (1 - task_weight(t)) * (task.mean() / kd.mean()).detach() * kd).mean(), "a timestep of its own"),
    (lambda task, kd, t: 8 * scaled(task, kd, t), "not the sum"),
    (lambda task, kd, t: scaled(task, kd, t) + 1, "how large must the whole be"),
    (lambda task, kd, t: scaled(task, kd, t).detach(), "carries no gradient"),
    (lambda task, kd, t: (task_weight(t) * task + (1 - task_weight(t)) * task / kd * kd).mean(), "cancels the loss"),
    (lambda task, kd, t: ((1 - task_weight(t)) * task + task_weight(t) * ratio(task, kd) * kd).mean(), "exchanged"),
    (lambda task, kd, t: (task_weight(t) * task + (1 - task_weight(t)) * task / kd.detach() * kd).mean(), "its gradient is not"),
    (lambda task, kd, t: (task_weight(t) * task.detach() + (1 - task_weight(t)) * ratio(task, kd) * kd).mean(), "its gradient is not"),
]


@pytest.mark.parametrize(("answer", "hint"), SCALED, ids=[hint for _, hint in SCALED])
def test_mistakes_in_eq_7(answer, hint):
    verdict = check_scaled(answer)
    assert not verdict and hint in verdict.message, verdict


def test_eq_7():
    assert check_scaled(scaled) and check_scaled(lambda task, kd, t: scaled(task.double(), kd.double(), t.double()))
    assert check_scaled(lambda task, kd, t: (task_weight(t) * task + (1 - task_weight(t)) * ratio(task, kd) * kd).mean())


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
