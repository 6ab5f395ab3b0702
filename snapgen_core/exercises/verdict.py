"""What a checker says of an answer, and what all of them need."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What a checker found; true if the answer is right. A notebook shows it as one line."""

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


UNANSWERED = Verdict(False, "no answer so far. Replace the three dots and run the cell again.")


def wrong(message: str) -> Verdict:
    return Verdict(False, message)


def right(message: str) -> Verdict:
    return Verdict(True, message)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.to(b), b, atol=1e-4)


def call(answer: Callable, *arguments) -> tuple[object, Verdict | None]:
    """(what `answer` returns, None), or (None, a verdict) where it is unfinished or fails."""
    try:
        value = answer(*arguments)
    except Exception as error:  # a learner's function may fail in any way: that is a wrong answer, not a crash here
        return None, wrong(f"your function stopped with {type(error).__name__}: {error}")
    return value, UNANSWERED if value is None or value is ... else None


def number(answer: object, asked: str) -> tuple[float, Verdict | None]:
    """(`answer` as a number, None), or (nan, a verdict) where there is none yet or it is something else: what was `asked`."""
    if answer is None or answer is ...:
        return math.nan, UNANSWERED
    try:
        return float(answer), None
    except (TypeError, ValueError):
        return math.nan, wrong(asked)
