"""The exercises' checkers: right answers pass, each likely mistake gets its own hint, and nothing crashes them."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch

from snapgen_core import flow
from snapgen_core.exercises import check_endpoints, check_heun, check_share_above


def expand(sigma):
    return sigma[:, None]


@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda x, v, s: ..., "no answer so far"),
        (lambda x, v, s: None, "no answer so far"),
        (lambda x, v, s: (..., ...), "two tensors"),
        (lambda x, v, s: x - expand(s) * v, "two tensors"),
        (lambda x, v, s: (x - s * v, x), "stopped with RuntimeError"),
        (lambda x, v, s: (x[:2], x[:2]), "shape"),
        (lambda x, v, s: (x + (1 - expand(s)) * v, x - expand(s) * v), "x0 comes first"),
        (lambda x, v, s: (x + expand(s) * v, x), "sign"),
        (lambda x, v, s: (x - (1 - expand(s)) * v, x), "At sigma = 0"),
        (lambda x, v, s: (x, x), "x0 is not right"),
        (lambda x, v, s: (x - expand(s) * v, x + expand(s) * v), "x0 is right. eps"),
        (lambda x, v, s: (x - expand(s) * v, v), "x0 is right, eps is not"),
    ],
)
def test_endpoints_wrong(answer, hint):
    verdict = check_endpoints(answer)
    assert not verdict and hint in repr(verdict) and repr(verdict).startswith("Not yet: ")


def test_endpoints_right():
    verdict = check_endpoints(lambda x, v, s: (x - expand(s) * v, x + (1 - expand(s)) * v))
    assert verdict and repr(verdict).startswith("Right: ")
    assert check_endpoints(lambda x, v, s: (flow.predicted_x0(x, v, s), flow.predicted_x0(x, v, s) + v))


@pytest.mark.parametrize(
    "answer, hint",
    [
        (..., "no answer so far"),
        (None, "no answer so far"),
        ("many", "a number"),
        ([0.1, 0.2], "a number"),
        (13.6, "between 0 and 1"),
        (float("nan"), "between 0 and 1"),
        (0.014, "without the shift"),
        (0.0005, "wrong way"),
        (0.864, "below 0.9"),
        (0.25, "evenly"),
        (0.5, "not this"),
    ],
)
def test_share_above_wrong(answer, hint):
    verdict = check_share_above(answer)
    assert not verdict and hint in repr(verdict)


def test_share_above_right_by_formula_and_by_counting():
    assert check_share_above(0.136)
    sigmas = flow.sample_sigmas(200_000, torch.Generator().manual_seed(0))
    assert check_share_above((sigmas > 0.9).float().mean())


def heun(model, x, sigmas, second_at=None, weight=0.5):
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = model(x, sigma)
        step = sigma_next - sigma
        v_next = model(x + step * v, sigma_next if second_at is None else second_at(sigma, sigma_next))
        x = x + step * weight * (v + v_next)
    return x


def heun_from_euler_point(model, x, sigmas):
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        ahead = x + (sigma_next - sigma) / 2 * model(x, sigma)
        x = ahead + (sigma_next - sigma) / 2 * model(ahead, sigma_next)
    return x


def wasteful(model, x, sigmas):
    model(x, sigmas[0]), model(x, sigmas[0])
    return heun(model, x, sigmas)


@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda model, x, sigmas: ..., "no answer so far"),
        (lambda model, x, sigmas: model(x), "stopped with TypeError"),
        (lambda model, x, sigmas: 3.0, "return the sample"),
        (lambda model, x, sigmas: x, "land on the data"),
        (lambda model, x, sigmas: heun(model, x, sigmas, weight=1.0), "half of their sum"),
        (lambda model, x, sigmas: heun(model, x, sigmas[:-1]), "land on the data"),
        (flow.sample, "twice a step"),
        (lambda model, x, sigmas: heun(model, x, sigmas, second_at=lambda a, b: a), "sigma_next"),
        (heun_from_euler_point, "Euler point"),
        (wasteful, "two times a step"),
    ],
)
def test_heun_wrong(answer, hint):
    verdict = check_heun(answer)
    assert not verdict and hint in repr(verdict)


def test_heun_right():
    assert check_heun(heun)


def test_the_folded_solutions_are_right():
    notebook = Path(__file__).parents[1] / "notebooks" / "03_flow_matching.ipynb"
    folded = [c.source for c in nbformat.read(str(notebook), as_version=4).cells if c.cell_type == "markdown" and "<details>" in c.source]
    first, second, third = (re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1) for text in folded)
    scope = {"torch": torch, "math": math, "flow": flow}
    for code in (first, second, third):
        exec(code, scope)
    assert check_endpoints(scope["endpoints"]) and check_share_above(scope["share_above"]) and check_heun(scope["heun"])
    assert scope["counted"].item() == pytest.approx(scope["share_above"], abs=2e-3)
