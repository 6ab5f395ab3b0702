"""Notebook 04: the checkers of its exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..distill import task_weight
from .verdict import UNANSWERED, Verdict, call, close, right, wrong


def check_half_weight(answer: float) -> Verdict:
    """04, exercise 1: the lower t at which data and teacher weigh the same, lambda(t) = 1/2."""
    if answer is None or answer is ...:
        return UNANSWERED
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return wrong("a number between 0 and 1/2, please.")
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


def _losses(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Task and distillation losses [8] that carry gradients, and timesteps [8]."""
    generator = torch.Generator().manual_seed(seed)
    task, distillation = (0.1 + torch.rand(8, generator=generator) for _ in range(2))
    return task.requires_grad_(), (5 * distillation).requires_grad_(), torch.rand(8, generator=generator)


def check_scaled(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """04, exercise 2: answer(task [B], distillation [B], t [B]) is S of Eq. 7, a scalar."""
    for seed in range(3):
        task, distillation, t = _losses(seed)
        value, failed = call(answer, task, distillation, t)
        if failed is not None:
            return failed
        if not isinstance(value, Tensor) or value.ndim:
            return wrong("return one number: the mean over the samples.")
        weight = task_weight(t)
        expected = task.detach().mean()
        if not close(value, expected):
            if close(value, (weight * task + (1 - weight) * distillation).mean()):
                return wrong("the ratio of the losses is missing: the two are not on one scale yet.")
            if close(value, (weight * task + (1 - weight) * task.mean() / distillation.mean() * distillation).mean()):
                return wrong("the ratio is that of the batch's means. Each sample has a timestep of its own.")
            if close(value, 8 * expected):
                return wrong("the mean over the samples, not the sum.")
            return wrong("the value is not right. Once the losses are on one scale, how large must the whole be?")
        if not value.requires_grad:
            return wrong("the value is right, but it carries no gradient: only the ratio is to be detached.")
        gradients = [torch.zeros(8) if g is None else g for g in torch.autograd.grad(value, (task, distillation), allow_unused=True)]
        wanted = weight / 8, (1 - weight) * (task / distillation).detach() / 8
        if close(gradients[1], torch.zeros(8)):
            return wrong("the value is right, but the distillation loss gets no gradient. The ratio has to be detached, or it cancels the loss that it scales.")
        if close(gradients[1], weight * (task / distillation).detach() / 8):
            return wrong("the weights are exchanged: lambda belongs to the task.")
        if not all(close(got, need) for got, need in zip(gradients, wanted)):
            return wrong("the value is right, its gradient is not. Detach the ratio, numerator and denominator, and nothing else.")
    return right("the value is the task loss alone, whatever the teacher says; the teacher speaks through the gradient.")


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
            return wrong("that is each sample's own ratio, as in the library. Here it is that of all samples in its bin.")
        if close(value, (task.mean() / distillation.mean()).detach().expand(8)) and not close(value, expected):
            return wrong("that is the batch's ratio. Timesteps differ in both losses: go bin by bin.")
        means = torch.stack([(task / distillation)[places == place].mean() for place in places]).detach()
        if close(value, means) and not close(value, expected):
            return wrong("that is the mean of the ratios. A sample that the student already draws as its teacher would make it explode; take the ratio of the means.")
        if not close(value, expected):
            return wrong(f"with {bins} bins the ratios are not right. Which bin is t in? int(t * bins).")
        if value.requires_grad:
            return wrong("the ratios are right, but they carry a gradient: detach them.")
    return right("a calmer estimate of the same ratio, from more than one sample. With one bin it is the batch's.")
