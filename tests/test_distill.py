"""Eq. 4-8 against sums written out, independent densities and gradients taken by hand."""

import math

import pytest
import torch
from torch import nn

from snapgen_core.distill import Projector, constant_weights, feature_loss, mean_near, multi_level, output_loss, scaled, task_weight


def losses(count=5, seed=0):
    """Three losses [B] that depend on a weight each, timesteps [B], and the weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.tensor(value)) for value in (0.7, 1.3, 2.1)]
    task, outputs, features = ((w * torch.randn(count, 6, generator=generator)).square().mean(1) for w in weights)
    return task, outputs, features, torch.rand(count, generator=generator), weights


def test_output_loss_by_hand():
    teacher, student = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    expected = [sum((a - b) ** 2 for a, b in zip(t.flatten().tolist(), s.flatten().tolist())) / 12 for t, s in zip(teacher, student)]
    assert output_loss(teacher, student).tolist() == pytest.approx(expected, rel=1e-5)


def test_feature_loss_by_hand_and_with_another_shape():
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert torch.allclose(feature_loss(a, b), torch.stack([nn.functional.mse_loss(x, y) for x, y in zip(a, b)]))
    with pytest.raises(ValueError, match=r"\[2, 4, 3, 3\], the student's projected \[2, 4, 6, 6\]"):
        feature_loss(a, torch.zeros(2, 4, 6, 6))


def test_the_teacher_gets_no_gradient():
    teacher, student = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
    (output_loss(teacher, student) + feature_loss(teacher, student)).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_the_weight_is_the_density_over_its_maximum():
    """torch's normal density under the change of variables t = sigmoid(x), and its maximum searched for."""
    t = torch.linspace(0.0005, 0.9995, 1999, dtype=torch.float64)
    x = t.log() - (1 - t).log()
    density = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp() / (t * (1 - t))
    assert torch.allclose(task_weight(t), density / density.max(), atol=1e-6)
    assert t[task_weight(t).argmax()].item() == pytest.approx(0.5, abs=1e-3)
    assert torch.trapezoid(task_weight(t), t).item() == pytest.approx(math.sqrt(2 * math.pi) / 4, rel=1e-4)  # a density's integral is 1


def test_the_weight_at_the_ends_is_zero_and_finite():
    weight = task_weight(torch.tensor([0.0, 1e-9, 0.5, 1.0]))
    assert torch.allclose(weight, torch.tensor([0.0, 0.0, 1.0, 0.0]), atol=1e-6)


def test_scaling_by_hand():
    task, outputs, _, t, _ = losses()
    total = 0.0
    for one, other, time in zip(task.tolist(), outputs.tolist(), t.tolist()):
        logit = math.log(time / (1 - time))
        weight = math.exp(-(logit**2) / 2) / (4 * time * (1 - time))
        near = [math.exp(-2 * (math.log(u / (1 - u)) - logit) ** 2) for u in t.tolist()]  # a Gaussian half a unit wide
        magnitudes = [sum(n * value for n, value in zip(near, values.tolist())) for values in (task, outputs)]
        total += weight * one + (1 - weight) * magnitudes[0] / magnitudes[1] * other
    assert scaled(task, outputs, t).item() == pytest.approx(total / len(t), rel=1e-5)


def test_mean_losses_near_a_timestep_find_the_curve_beneath():
    """Noisy losses around a known curve over t: the estimate is far nearer to it than single losses are."""
    generator = torch.Generator().manual_seed(0)
    t = torch.sigmoid(torch.randn(512, generator=generator))
    curve = 1 + (2 * t - 1).square()
    noisy = curve * torch.rand(512, generator=generator) * 2
    inside = (t > 0.1) & (t < 0.9)
    error = (mean_near(noisy, t) - curve)[inside].square().mean()
    assert error < 0.05 * (noisy - curve)[inside].square().mean()
    alone = torch.tensor([1e-9, 0.2, 0.5, 0.8])
    assert torch.allclose(mean_near(curve[:4], alone, width=1e-3), curve[:4])  # nobody is near


def test_gradients_of_the_scaled_loss():
    """lambda dL_task + (1 - lambda) |L_task| / |L_kd| dL_kd, with the ratio as a constant."""
    task, outputs, _, t, weights = losses()
    d_task, d_outputs, _ = torch.autograd.grad(scaled(task, outputs, t), weights, allow_unused=True)
    weight, ratio = task_weight(t), mean_near(task, t) / mean_near(outputs, t)
    assert d_task.item() == pytest.approx((weight * 2 * task / weights[0]).mean().item(), rel=1e-5)
    assert d_outputs.item() == pytest.approx(((1 - weight) * ratio * 2 * outputs / weights[1]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-4, 3.0, 1e4])
def test_a_constant_factor_of_the_distillation_loss_changes_nothing(factor):
    values, gradients = [], []
    for scale in (1.0, factor):
        task, outputs, _, t, weights = losses()
        loss = scaled(task, scale * outputs, t)
        values.append(loss.item())
        gradients.append(torch.stack(torch.autograd.grad(loss, weights[:2])))
    assert values[0] == pytest.approx(values[1], rel=1e-5) and torch.allclose(*gradients, rtol=1e-4)


def test_equal_losses_give_the_plain_mean():
    task, _, _, t, _ = losses()
    assert scaled(task, task, t).item() == pytest.approx(task.mean().item(), rel=1e-6)


def test_a_student_that_has_become_its_teacher_gives_no_nan():
    task, _, _, t, weights = losses()
    same = (0 * weights[1]).expand(len(t))
    loss = scaled(task, same, t)
    loss.backward()
    assert loss.isfinite() and weights[1].grad.isfinite()


def test_eq_8_and_eq_6():
    task, outputs, features, t, _ = losses()
    assert torch.allclose(multi_level(task, outputs, features, t), scaled(task, outputs, t) + scaled(task, features, t))
    assert constant_weights(task, outputs, features, 0.5, 2.0).item() == pytest.approx((task + 0.5 * outputs + 2 * features).mean().item(), rel=1e-6)


@pytest.mark.parametrize(("student", "size"), [((2, 6, 4, 4), (8, 8)), ((2, 6, 8, 8), (4, 4)), ((2, 6, 5, 7), (5, 7))])
def test_the_projector_has_two_convolutions_and_the_teachers_shape(student, size):
    projector = Projector(student[1], 10, size)
    assert sum(isinstance(module, nn.Conv2d) for module in projector.modules()) == 2
    features = torch.randn(student, requires_grad=True)
    projected = projector(features)
    assert projected.shape == (2, 10, *size)
    feature_loss(torch.randn_like(projected), projected).sum().backward()
    assert features.grad.abs().sum() > 0 and all(p.grad is not None for p in projector.parameters())
