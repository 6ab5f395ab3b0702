"""Notebook 03: the checkers of its exercises."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import flow
from .verdict import Verdict, call, close, number, right, wrong


def check_endpoints(answer: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Verdict:
    """03, exercise 1: answer(x_t [B, D], v [B, D], sigma [B]) gives (x0, eps), both [B, D]."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=generator)
    sigma = torch.linspace(0.1, 0.9, 5)
    x_t, v = flow.interpolate(x0, eps, sigma), flow.velocity(x0, eps)
    value, failed = call(answer, x_t, v, sigma)
    if failed is not None:
        return failed
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)):
        return wrong("return two tensors, x0 and eps, in this order.")
    if any(part.shape != x0.shape for part in value):
        return wrong(f"both must have x_t's shape {list(x0.shape)}, yours have {[list(part.shape) for part in value]}. sigma is [B]: write sigma[:, None].")
    first, second = value
    if close(first, eps) and close(second, x0):
        return wrong("both are found, but x0 comes first.")
    if not close(first, x0):
        if close(first, x_t + sigma[:, None] * v):
            return wrong("x0: v points from the data to the noise, so against v you reach the data. Look at the sign.")
        if close(first, x_t - (1 - sigma[:, None]) * v):
            return wrong("x0: how far is it from x_t to the data? At sigma = 0 you are there already.")
        return wrong("x0 is not right. Walk from x_t at constant velocity v until the noise level is 0.")
    if not close(second, eps):
        if close(second, x_t + sigma[:, None] * v):
            return wrong("x0 is right. eps: the noise lies at sigma = 1. How far is that from where you stand?")
        return wrong("x0 is right, eps is not. It lies at the path's other end, at sigma = 1.")
    return right("one prediction, three readings. v, x0 and eps tell the same once x_t is known.")


def check_share_above(answer: float) -> Verdict:
    """03, exercise 2: which share of the training levels (logit-normal, shift 3) lies above 0.9?"""
    value, failed = number(answer, "a number between 0 and 1, please.")
    if failed is not None:
        return failed

    def tail(z: float) -> float:
        return 0.5 * math.erfc(z / math.sqrt(2))

    level, shift = math.log(0.9 / 0.1), math.log(3)
    if not 0 <= value <= 1:
        return wrong("a share lies between 0 and 1.")
    if abs(value - tail(level - shift)) < 0.004:
        return right("the shift moves the bell by log 3 in log-odds, so the question is how often a normal number exceeds log 9 - log 3.")
    if abs(value - tail(level)) < 0.004:
        return wrong("that is the share without the shift. Which u becomes 0.9?")
    if abs(value - tail(level + shift)) < 0.002:
        return wrong("you moved the bell the wrong way: the shift makes levels noisier, not cleaner.")
    if abs(value - (1 - tail(level - shift))) < 0.004:
        return wrong("that is the share below 0.9.")
    if abs(value - 0.25) < 0.004:
        return wrong("that would be so for u drawn evenly from 0 to 1. Here logit(u) is a normal number.")
    return wrong("not this. Which u does the shift turn into 0.9, and how often does a normal number exceed logit(u)?")


def check_heun(answer: Callable[[Callable, Tensor, Tensor], Tensor]) -> Verdict:
    """03, exercise 3: answer(model, noise, sigmas) is Heun's second-order sampler; model(x, sigma) is a velocity."""
    target, noise = torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    value, failed = call(answer, lambda x, sigma: noise - target, noise, flow.inference_sigmas(3).double())
    if failed is not None:
        return failed
    if not isinstance(value, Tensor) or value.shape != noise.shape:
        return wrong(f"return the sample, a tensor of the noise's shape {list(noise.shape)}.")
    if not torch.allclose(value, target, atol=1e-6):
        return wrong("on a straight path, where v is constant, one must land on the data exactly; yours does not. Does the step average the two velocities (half of their sum), and does it go all the way to the last sigma?")

    calls = []

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
        """The exact velocity of data N(2, 0.5^2)."""
        calls.append(float(sigma))
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        return -2 + (sigma - (1 - sigma) * 0.25) / variance * (x - (1 - sigma) * 2)

    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 2 + 0.5 * start  # where the exact flow carries each point
    errors = []
    for steps in (32, 64):
        calls.clear()
        sample, failed = call(answer, gaussian, start, flow.inference_sigmas(steps, shift=1.0).double())
        if failed is not None:
            return failed
        errors.append((sample - exact).abs().mean().item())
    if errors[1] > 2e-3:
        hint = "is the second velocity taken at the Euler point, with sigma_next?" if len(calls) > 64 else "that is as far off as Euler. Heun asks the model twice a step."
        return wrong(f"it works on straight paths, but on curved ones the error is still large: {hint}")
    if errors[0] / errors[1] < 3.2:
        return wrong("twice as many steps should leave about a quarter of the error; yours falls more slowly. Is the second velocity taken at the Euler point with sigma_next, and does the final step start from x again, not from the Euler point?")
    if len(calls) > 128:
        return wrong(f"right in its numbers, but it asked the model {len(calls)} times in 64 steps; two times a step are enough.")
    return right("second order: twice the steps, a quarter of the error, at two model calls a step.")
