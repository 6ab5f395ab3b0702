"""Notebook 01's checkers: right answers pass, each likely mistake gets its own hint, and nothing crashes them."""

from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from snapgen_core.exercises import check_design, check_layer_macs, check_separable
from snapgen_core.scales import UNET_PRESETS

PAPER = UNET_PRESETS["paper"]


def right_macs(S, C, L, D, E):
    return 2 * S * C * C + 2 * L * D * E + 2 * S * L * C + 9 * S * C * C


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda i, o: ..., "no answer so far"),
        (lambda i, o: 1 / 0, "ZeroDivisionError"),
        (lambda i, o: 9 * i * o + o, "a dense one."),
        (lambda i, o: 9 * i * o, "without its bias"),
        (lambda i, o: 9 * i + i * o, "has a bias"),
        (lambda i, o: 9 * i + i + i * o + o, "no bias"),
        (lambda i, o: 9 * o + i * o + o, "comes first"),
        (lambda i, o: 17, "it is not 17"),
    ],
)
def test_separable_wrong(answer, hint):
    verdict = check_separable(answer)
    assert not verdict and hint in repr(verdict)


def test_separable_right():
    assert check_separable(lambda i, o: 9 * i + i * o + o)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: ..., "no answer so far"),
        (lambda S, C: 1, "TypeError"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - 2 * L * D * E, "Keys and values are missing"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) + 2 * L * D * (C - E), "E channels and not C"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - 2 * S * L * C, "products are missing"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - S * L * C, "two products"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) + 2 * S * C * (S - L), "not at itself"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - S * C * C, "C x C projection"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - 3 * S * C * C, "twice as wide"),
        (lambda S, C, L, D, E: right_macs(S, C, L, D, E) - 9 * S * C * C, "feed-forward layer is missing"),
        (lambda S, C, L, D, E: 5, "another number than 5"),
    ],
)
def test_layer_macs_wrong(answer, hint):
    verdict = check_layer_macs(answer)
    assert not verdict and hint in repr(verdict)


def test_layer_macs_right():
    assert check_layer_macs(right_macs)


@pytest.mark.parametrize(
    ("design", "hint"),
    [
        (..., "give a preset"),
        (PAPER, "too much to compute"),
        (replace(PAPER, channels=(64, 128, 768)), "too much to store"),
        (replace(PAPER, channels=(128, 256, 512)), "smaller than asked"),
        (replace(PAPER, kv_heads=None), "kv_heads must stay 1"),
        (replace(PAPER, self_attention=(False, False, False)), "self_attention must stay"),
        (replace(PAPER, ffn_ratio=4), "undoes step (d)"),
        (replace(PAPER, expansion=1), "step (c)"),
        (replace(PAPER, transformer_depth=(0, 2, 4)), "from the first one on"),
        (replace(PAPER, channels=(256, 512)), "three stages"),
        (replace(PAPER, channels=(200, 300, 600)), "cannot be built"),
    ],
)
def test_design_wrong(design, hint):
    verdict = check_design(design)
    assert not verdict and hint in repr(verdict)


def test_the_notebooks_solutions_are_right():
    notebook = nbformat.read(Path(__file__).parents[1] / "notebooks" / "01_efficient_unet.ipynb", as_version=4)
    solutions = [cell.source.partition("```python\n")[2].partition("```")[0] for cell in notebook.cells if "olution</summary>" in cell.source]
    assert len(solutions) == 3
    names = {"replace": replace, "UNET_PRESETS": UNET_PRESETS}
    for solution in solutions:
        exec(solution, names)  # noqa: S102
    assert check_separable(names["separable_parameters"])
    assert check_layer_macs(names["layer_macs"])
    assert check_design(names["design"])
    assert check_design(replace(PAPER, channels=(192, 384, 768), layers_per_block=1))
