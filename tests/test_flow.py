"""Eq. 1-3 and the schedules against closed forms and another implementation."""

import math

import pytest
import torch

from snapgen_core import flow


def test_time_shift_closed_form_and_ends():
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert torch.allclose(flow.time_shift(u), torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0]))
    assert torch.equal(flow.time_shift(u, shift=1.0), u)


def test_time_shift_is_a_gain_in_log_odds():
    u = torch.rand(100)
    assert torch.allclose(torch.logit(flow.time_shift(u, 3.0)), torch.logit(u) + math.log(3), atol=1e-4)


def test_inference_sigmas_shift_once():
    assert torch.allclose(flow.inference_sigmas(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    for steps in (1, 2, 28):
        sigmas = flow.inference_sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        flow.inference_sigmas(0)


def test_sigmas_agree_with_diffusers_when_given_explicitly():
    from diffusers import FlowMatchEulerDiscreteScheduler

    # Explicit sigmas are shifted once by the scheduler, so the unshifted ones go in.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1].tolist())
    assert torch.allclose(scheduler.sigmas, flow.inference_sigmas(4), atol=1e-6)
    assert torch.allclose(scheduler.timesteps, flow.TIMESTEPS * flow.inference_sigmas(4)[:-1], atol=1e-3)


def test_euler_agrees_with_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 8)[:-1].tolist())
    noise, slope = torch.randn(2, 3, 4, 4), torch.randn(3, 1, 1)
    theirs = noise
    for t in scheduler.timesteps:
        theirs = scheduler.step(torch.tanh(theirs) * slope, t, theirs).prev_sample
    ours = flow.sample(lambda x, sigma: torch.tanh(x) * slope, noise, flow.inference_sigmas(7))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_logit_normal_quantiles():
    sigmas = flow.sample_sigmas(200_000, torch.Generator().manual_seed(0), shift=1.0)
    for p in (0.1, 0.5, 0.9):
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(p))
        assert torch.quantile(sigmas, p).item() == pytest.approx(torch.sigmoid(z).item(), abs=5e-3)
    shifted = flow.sample_sigmas(200_000, torch.Generator().manual_seed(0), shift=3.0)
    assert torch.allclose(shifted, flow.time_shift(sigmas, 3.0))


def test_path_velocity_is_its_derivative_and_x0_comes_back():
    x0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    sigma = torch.rand(5, dtype=torch.float64)
    h = 1e-6
    slope = (flow.interpolate(x0, eps, sigma + h) - flow.interpolate(x0, eps, sigma - h)) / (2 * h)
    assert torch.allclose(slope, flow.velocity(x0, eps), atol=1e-6)
    x_t = flow.interpolate(x0, eps, sigma)
    assert torch.allclose(flow.predicted_x0(x_t, flow.velocity(x0, eps), sigma), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.zeros(5)), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.ones(5)), eps)


def test_loss_is_per_sample_and_zero_only_for_the_target():
    x0, eps = torch.randn(2, 4, 3, 8, 8)
    v = flow.velocity(x0, eps)
    assert torch.equal(flow.flow_matching_loss(v, x0, eps), torch.zeros(4))
    v[2] += 0.5
    assert torch.allclose(flow.flow_matching_loss(v, x0, eps), torch.tensor([0, 0, 0.25, 0]), atol=1e-6)


def test_sampler_is_exact_on_straight_paths_in_any_number_of_steps():
    target, noise = torch.randn(2, 3, 2, 2)[:, None]
    for steps in (1, 4, 28):
        out = flow.sample(lambda x, sigma: noise - target, noise, flow.inference_sigmas(steps))
        assert torch.allclose(out, target, atol=1e-5)


def test_sampler_recovers_a_gaussian():
    """Data N(2, 0.5^2) has the exact velocity field below; many steps must carry noise to it."""
    mean, std = 2.0, 0.5

    def field(x, s):
        variance = (1 - s) ** 2 * std**2 + s**2
        centred = x - (1 - s) * mean
        return -mean + (s - (1 - s) * std**2) / variance * centred

    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    out = flow.sample(field, noise, flow.inference_sigmas(200))
    assert out.mean().item() == pytest.approx(mean, abs=0.02) and out.std().item() == pytest.approx(std, abs=0.02)


def test_guidance_scale_one_is_conditional_and_zero_unconditional():
    a, b = torch.randn(2, 2, 3)
    assert torch.allclose(flow.guide(a, b, 1.0), b) and torch.equal(flow.guide(a, b, 0.0), a)
    assert torch.allclose(flow.guide(a, b, 3.0) - b, 2 * (b - a), atol=1e-6)
