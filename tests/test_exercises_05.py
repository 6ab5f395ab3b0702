"""Notebook 05's checkers: right answers pass, each likely mistake gets its own hint."""

import pytest
import torch

from snapgen_core import flow
from snapgen_core.exercises import check_penalty, check_straight_loss, check_three_levels

RUN = flow.inference_sigmas(3)


def test_three_levels():
    assert check_three_levels(RUN[:-1]) and check_three_levels([1, 6 / 7, 0.6]) and check_three_levels([0.6, 1, 6 / 7])
    for answer, hint in (
        (..., "no answer"), ("a", "three numbers"), (RUN, "guesses nothing"), (RUN[1:], "the judge sees"), ([1, 2 / 3, 1 / 3], "before the time shift"),
        ([1.0, 0.5], "three guesses"), ([1, 0.9, 0.75], "not these"), ([float("nan")] * 3, "not these"),
    ):
        verdict = check_three_levels(answer)
        assert not verdict and hint in verdict.message, (answer, verdict)


def loss(target):
    return lambda here, there, sigma, sigma_next, v: (target(here, there, sigma, sigma_next) - v).square().mean(dim=(1, 2, 3))


def straight(here, there, sigma, sigma_next):
    return (there - here) / (sigma_next - sigma)


LOSSES = [
    (lambda *given: ..., "no answer"),
    (lambda *given: 3.0, "a tensor"),
    (lambda *given: loss(straight)(*given).mean(), "samples apart"),
    (lambda *given: given[0], "the shape"),
    (loss(lambda here, there, a, b: -straight(here, there, a, b)), "backwards"),
    (loss(lambda here, there, a, b: there - here), "not the velocity"),
    (lambda *given: 256 * loss(straight)(*given), "the sum over"),
    (loss(lambda here, there, a, b: there), "euler_step"),
]


@pytest.mark.parametrize(("answer", "hint"), LOSSES, ids=[hint for _, hint in LOSSES])
def test_mistakes_in_the_straight_loss(answer, hint):
    verdict = check_straight_loss(answer)
    assert not verdict and hint in verdict.message, verdict


def slopes(judge, x, graph=True):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(judge(x).sum(), x, create_graph=graph)[0]


def half_detached(judge, x):
    slope = slopes(judge, x)
    return (slope.detach() * slope).sum(dim=1).mean()


PENALTIES = [
    (lambda judge, x: ..., "no answer"),
    (lambda judge, x: judge(x), "one number"),
    (lambda judge, x: slopes(judge, x).square().mean(), "mean over elements"),
    (lambda judge, x: slopes(judge, x).norm(dim=1).mean(), "its square"),
    (lambda judge, x: slopes(judge, x).square().sum(), "sum over the batch"),
    (lambda judge, x: judge(x).square().mean(), "squared slope"),
    (lambda judge, x: slopes(judge, x, graph=False).square().sum(dim=1).mean(), "create_graph"),
    (half_detached, "detached on the way"),
]


@pytest.mark.parametrize(("answer", "hint"), PENALTIES, ids=[hint for _, hint in PENALTIES])
def test_mistakes_in_the_penalty(answer, hint):
    verdict = check_penalty(answer)
    assert not verdict and hint in verdict.message, verdict


def test_right_answers():
    assert check_straight_loss(loss(straight))
    assert check_penalty(lambda judge, x: slopes(judge, x).square().sum(dim=1).mean())
