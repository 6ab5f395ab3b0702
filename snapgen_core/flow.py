"""Rectified flow: paths, timesteps, time shift, the task loss and the sampler (Sec. 3.3, Eq. 1-3).

Names: x0 is the clean latent, eps standard normal noise, sigma in [0, 1] the noise level (0: clean, 1: noise),
v the velocity. The network sees the timestep 1000 * sigma.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

TIMESTEPS = 1000


def time_shift(u: Tensor, shift: float = 3.0) -> Tensor:
    """Noise level of the unshifted level u: shift * u / (1 + (shift - 1) * u), as in SD3 (Sec. 3.3).

    At shift 3 the middle of the path, u = 1/2, becomes sigma = 3/4. Applied exactly once, in training and sampling.
    """
    return shift * u / (1 + (shift - 1) * u)


def unshift(sigma: Tensor, shift: float = 3.0) -> Tensor:
    """The inverse of `time_shift`: the level u that became sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def sample_sigmas(count: int, generator: torch.Generator | None = None, shift: float = 3.0) -> Tensor:
    """Training noise levels [count]: logit-normal with location 0 and scale 1 (Sec. 4), then the time shift. They are on the
    device of `generator`."""
    device = generator.device if generator else None
    return time_shift(torch.sigmoid(torch.randn(count, generator=generator, device=device)), shift)


def inference_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The steps + 1 noise levels of a sampler run, from 1 to 0: four steps at shift 3 give 1, .9, .75, .5, 0."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def _per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like).reshape(-1, *[1] * (like.dim() - 1))


def interpolate(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 1: x_t = (1 - sigma) x0 + sigma eps, for x0 and eps [B, ...] and sigma [B]."""
    sigma = _per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """The target of Eq. 2: dx_t / dsigma = eps - x0."""
    return eps - x0


def predicted_x0(x_t: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a velocity points to: x_t - sigma v (Eq. 1 solved for x0)."""
    return x_t - _per_sample(sigma, x_t) * v


def flow_matching_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Eq. 2 for each sample, [B]: mean over the elements of ((eps - x0) - v)^2.

    The mean in place of the sum only rescales the loss, so that its size does not depend on the resolution.
    """
    return (velocity(x0, eps) - v.to(x0.dtype)).square().flatten(1).mean(1)


def euler_step(x: Tensor, v: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """Eq. 3: x_{t-1} = x_t + (sigma_{t-1} - sigma_t) v."""
    return x + (sigma_next - sigma) * v


def guide(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance [Ho & Salimans 2022]: scale 1 is the plain conditional velocity."""
    return v_uncond + scale * (v_cond - v_uncond)


def trajectory(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Flow-Euler from `noise` [B, ...] along `sigmas` [N+1]; model(x, sigma) gives the velocity [B, ...].

    Yields (step, x after the step, predicted clean x0) after each of the N steps, so that a caller can show progress.
    """
    x = noise
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        v = model(x, sigma)
        x0 = predicted_x0(x, v, sigma)
        x = euler_step(x, v, sigma, sigma_next)
        yield step, x, x0


def sample(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """The end of `trajectory`: a clean sample [B, ...]."""
    x = noise
    for _, x, _ in trajectory(model, noise, sigmas):
        pass
    return x
