"""Notebook 05: the checkers of its exercises."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import flow
from .verdict import UNANSWERED, Verdict, call, close, right, wrong


def check_three_levels(answer: Tensor | list[float]) -> Verdict:
    """05, exercise 1: the levels at which a student that draws in three steps guesses."""
    if answer is None or answer is ...:
        return UNANSWERED
    try:
        levels = torch.as_tensor(answer, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        return wrong("three numbers, please, as a list or a tensor.")
    run = flow.inference_sigmas(3)
    if len(levels) == 4 and close(levels.sort(descending=True).values, run):
        return wrong("those are the levels of the whole run. At the last one it has arrived, and guesses nothing.")
    if len(levels) != 3:
        return wrong("three steps, three guesses.")
    levels = levels.sort(descending=True).values
    if close(levels, torch.linspace(1, 0, 4)[:-1]):
        return wrong("evenly spaced levels are those before the time shift.")
    if close(levels, run[1:]):
        return wrong("those are the levels at which the steps end: what the judge sees. Where does the student guess?")
    if not close(levels, run[:-1]):
        return wrong("not these. `flow.inference_sigmas` knows the levels of a run.")
    return right("1, 6/7 and 3/5. The judge sees each guess at the next one.")


def check_straight_loss(answer: Callable[[Tensor, Tensor, float, float, Tensor], Tensor]) -> Verdict:
    """05, exercise 2: answer(here, there, sigma, sigma_next, v) is the few-step teacher's loss of each sample, [B]."""
    generator = torch.Generator().manual_seed(0)
    here, there, v = (torch.randn(3, 16, 4, 4, generator=generator) for _ in range(3))
    sigma, sigma_next = 0.9, 0.75
    value, failed = call(answer, here, there, sigma, sigma_next, v)
    if failed is not None:
        return failed
    if not isinstance(value, Tensor):
        return wrong("return a tensor.")

    def loss(target: Tensor) -> Tensor:
        return (target - v).square().mean(dim=(1, 2, 3))

    expected = loss((there - here) / (sigma_next - sigma))
    if value.shape == () and close(value, expected.mean()):
        return wrong("that is the mean over the batch. Keep the samples apart: [B].")
    if value.shape != (3,):
        return wrong(f"return a loss for each sample, [B]; yours has the shape {list(value.shape)}.")
    if close(value, expected):
        return right("it is Eq. 4 with the straight line between two places as the teacher's answer.")
    if close(value, loss((there - here) / (sigma - sigma_next))):
        return wrong("the target points backwards: levels fall along a run, so sigma_next - sigma is negative.")
    if close(value, loss(there - here)):
        return wrong("that is the way, not the velocity. Divide by how far the level moves.")
    if close(value / expected, torch.full((3,), 256.0)):
        return wrong("that is the sum over a sample's elements; take the mean, as in Eq. 4 here.")
    return wrong("not right. Which velocity takes `flow.euler_step` from here to there?")


def check_penalty(answer: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Verdict:
    """05, exercise 3: answer(judge, x) is R1, the mean over the batch of the squared slope of judge's logits at x [B, D]."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 3, generator=generator).requires_grad_()
    x = torch.randn(4, 5, generator=generator)

    def judge(samples: Tensor) -> Tensor:
        return (samples.square() @ matrix) / 2  # the slope of the sum of logits is x times the sum of each row

    value, failed = call(answer, judge, x.clone())
    if failed is not None:
        return failed
    if not isinstance(value, Tensor) or value.shape != ():
        return wrong("return one number, as a tensor.")
    slope = (x * matrix.sum(dim=1)).detach()
    expected = slope.square().sum(dim=1).mean()
    if close(value, slope.square().mean()):
        return wrong("that is the mean over elements. The squared length of a slope is a sum over them; the mean is over the batch.")
    if close(value, slope.norm(dim=1).mean()):
        return wrong("that is the slope's length. R1 takes its square.")
    if close(value, expected * len(x)):
        return wrong("that is the sum over the batch; take the mean.")
    if not close(value, expected):
        return wrong("not the squared slope. `torch.autograd.grad(judge(x).sum(), x)` gives the slopes of all samples.")
    if not value.requires_grad:
        return wrong("the number is right, but nothing can be learned from it: the slope has to carry a gradient itself (create_graph=True).")
    (by_matrix,) = torch.autograd.grad(value, matrix)
    truth = (2 * x.square().sum(dim=0) * matrix.sum(dim=1) / len(x)).detach()[:, None].expand(5, 3)
    if not close(by_matrix, truth):
        return wrong("the number is right, its gradient for the judge's weights is not. Is something detached on the way?")
    return right("and its gradient reaches the judge: steepness where the data lie now costs something.")
