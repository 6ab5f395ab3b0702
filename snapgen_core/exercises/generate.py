"""Notebook 08: the checkers of its exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .verdict import Verdict, call, number, right, wrong


def check_calls(answer: float) -> Verdict:
    """08, exercise 1: samples that go through the student for three pictures in 28 guided steps."""
    value, failed = number(answer, "one number, please.")
    if failed is not None:
        return failed
    hints = {28: "that is one picture without guidance.", 56: "that is one picture.", 84: "guidance asks the student twice a step: with the prompt, and without.", 12: "that is three pictures in four steps without guidance: what a distilled student needs."}
    if value in hints:
        return wrong(hints[value])
    return right("168; a student distilled to four steps without guidance needs 12.") if value == 168 else wrong("not that many: pictures times steps times what guidance costs.")


def check_arc(answer: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """08, exercise 2: answer(a [N], b [N], part) lies on the arc between a and b, `part` of the angle from a."""
    generator = torch.Generator().manual_seed(0)
    for size in (64, 1000):
        a, b = torch.randn(2, size, generator=generator)
        b = b * a.norm() / b.norm()
        for part in (0.0, 0.3, 0.5, 1.0):
            value, failed = call(answer, a.clone(), b.clone(), part)
            if failed is not None:
                return failed
            if not isinstance(value, Tensor) or value.shape != a.shape:
                return wrong("return one noise, as long as a and b.")
            if part in (0, 1) and not torch.allclose(value, b if part else a, atol=1e-3):
                return wrong("it begins at a (part 0) and ends at b (part 1).")
            if torch.allclose(value, torch.lerp(a, b, part), atol=1e-3) and part not in (0, 1):
                return wrong("that is the straight line: its middle is shorter than its ends, and no noise any more.")
            if abs(value.norm() / a.norm() - 1) > 1e-3:
                return wrong("it leaves the sphere: on the way its length differs from that of a and b.")
            angle, whole = (math.acos(torch.nn.functional.cosine_similarity(a, x, dim=0).clamp(-1, 1)) for x in (value, b))
            if abs(angle - part * whole) > 1e-2:
                return wrong("on the sphere, but not at even speed: `part` is the share of the angle.")
    return right("that is `studio.engine.on_sphere`; it is known as slerp.")


def check_admit(answer: Callable) -> Verdict:
    """08, exercise 3: answer(running, waiting, task) -> (running, waiting, taken) for a queue of one."""
    cases = [
        ((None, None, "a"), ("a", None, True), "an idle studio begins at once."),
        (("a", None, "b"), ("a", "b", True), "one task runs: the next one waits."),
        (("a", "b", "c"), ("a", "b", False), "one runs and one waits: the third is refused, and nothing is lost."),
        ((None, None, ""), (None, None, False), "an empty prompt is no task: refuse it."),
        (("a", None, ""), ("a", None, False), "an empty prompt is no task, though there is room for one."),
    ]
    for given, expected, hint in cases:
        value, failed = call(answer, *given)
        if failed is not None:
            return failed
        if not isinstance(value, tuple) or len(value) != 3:
            return wrong("return three things: running, waiting, and whether the task was taken.")
        if tuple(value[:2]) != expected[:2] or bool(value[2]) != expected[2]:
            return wrong(f"{hint} For {given} it gave {value}.")
    return right("that is `Desk.ask`, but for the lock that keeps two clicks from being both the first.")
