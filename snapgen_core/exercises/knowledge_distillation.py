"""Notebook 04: the checkers of its exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import flow
from ..distill import task_weight
from .verdict import UNANSWERED, Verdict, call, close, number, right, wrong


def check_half_weight(answer: float) -> Verdict:
    """04, exercise 1: the lower t at which data and teacher have equal weight, lambda(t) = 1/2."""
    value, failed = number(answer, "a number between 0 and 1/2, please.")
    if failed is not None:
        return failed
    low, high = 0.0, 0.5  # lambda rises from 0 to 1 between these
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if task_weight(torch.tensor(middle, dtype=torch.float64)) < 0.5 else (low, middle)
    if abs(value - low) < 0.005:
        return right(f"t = {low:.3f}, and by symmetry {1 - low:.3f}. Between them the data speak louder, outside the teacher does.")
    if abs(value - (1 - low)) < 0.005:
        return wrong("that is the upper one. Which is the lower?")
    if 0 < value < 1 and abs(math.exp(-(math.log(value / (1 - value)) ** 2) / 2) - 0.5) < 0.02:
        return wrong("you left out t (1 - t), which comes from the change of variables.")
    if 0 < value < 1 and abs(4 / math.sqrt(2 * math.pi) * task_weight(torch.tensor(value)).item() - 0.5) < 0.02:
        return wrong("there the density itself is 1/2. lambda is the density over its maximum.")
    return wrong("not there. Plot `task_weight` over t, or search: it rises all the way from t = 0 to t = 1/2.")


def check_teachers_share(share: float, weight: float) -> Verdict:
    """04, exercise 2: the share of training samples in which the teacher weighs more than the data, and the teacher's mean
    weight over training samples."""
    if share is ... or weight is ... or share is None or weight is None:
        return UNANSWERED
    try:
        answer = torch.tensor([float(share), float(weight)])
    except (TypeError, ValueError):
        return wrong("two numbers between 0 and 1, please.")
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = torch.sigmoid(torch.special.ndtri(even))  # quantiles of the logit-normal

    def both(t: Tensor) -> Tensor:
        lam = task_weight(t)
        return torch.stack([(lam < 0.5).double().mean(), (1 - lam).mean()]).float()

    def near(expected: Tensor) -> bool:
        return bool((answer - expected).abs().max() < 0.01)

    if near(both(drawn)):
        return right("where training looks most often it listens to the data. The teacher leads at the ends, and these are rare.")
    if near(both(even)):
        return wrong("those are the figures for timesteps drawn evenly. Training draws them logit-normal: `flow.sample_sigmas(n, shift=1.0)`.")
    if near(both(flow.time_shift(drawn, 3.0))):
        return wrong("you put shifted noise levels into lambda. It belongs to the timestep before the shift.")
    if near(1 - both(drawn)):
        return wrong("those are the data's. What is left for the teacher?")
    first, second = ((answer - both(drawn)).abs() < 0.01).tolist()
    if first or second:
        return wrong("the weight is right, the share is not: count the samples where lambda < 1/2." if second else "the share is right, the weight is not: the mean of 1 - lambda over all samples.")
    return wrong("not these. Draw many timesteps, and look at `task_weight` of each.")


def _losses(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Task and distillation losses [8] that carry gradients, and timesteps [8]."""
    generator = torch.Generator().manual_seed(seed)
    task, distillation = (0.1 + torch.rand(8, generator=generator) for _ in range(2))
    return task.requires_grad_(), (5 * distillation).requires_grad_(), torch.rand(8, generator=generator)


def check_binned_ratio(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Verdict:
    """04, exercise 3: answer(task [B], distillation [B], t [B], bins) is |L_task| / |L_kd| for each sample, [B], where both
    are means over the samples in the same one of `bins` equal parts of [0, 1]."""
    for seed, bins in ((0, 4), (1, 2), (2, 1), (3, 8)):
        task, distillation, t = _losses(seed)
        value, failed = call(answer, task, distillation, t, bins)
        if failed is not None:
            return failed
        if not isinstance(value, Tensor) or value.shape != (8,):
            return wrong("return a ratio for each sample, [B].")
        places = (t * bins).long()
        expected = torch.stack([task[places == place].mean() / distillation[places == place].mean() for place in places]).detach()
        if close(value, (task / distillation).detach()) and not close(value, expected):
            return wrong("that is each sample's own ratio. Here it is that of all samples in its bin.")
        if close(value, (task.mean() / distillation.mean()).detach().expand(8)) and not close(value, expected):
            return wrong("that is the batch's ratio. Timesteps differ in both losses: go bin by bin.")
        means = torch.stack([(task / distillation)[places == place].mean() for place in places]).detach()
        if close(value, means) and not close(value, expected):
            return wrong("that is the mean of the ratios. One sample on which student and teacher nearly agree would rule it; take the ratio of the means.")
        if not close(value, expected):
            return wrong(f"with {bins} bins the ratios are not right. Which bin is t in? int(t * bins).")
        if value.requires_grad:
            return wrong("the ratios are right, but they carry a gradient: detach them.")
    return right("another estimate of the same ratio. With one bin it is the batch's, with very many each sample's own.")
