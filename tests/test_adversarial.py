"""The decoder's adversarial losses: by hand, and each gradient where it belongs."""

import pytest
import torch
from torch import nn

from snapgen_core.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, fooling_loss


def test_hinge_by_hand():
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert discriminator_loss(real, made).item() == pytest.approx((0 + 0.5) / 4 + (0 + 1.25) / 4)


def test_a_patch_is_judged_by_itself():
    discriminator, pictures = PatchDiscriminator(channels=8), torch.randn(2, 3, 64, 32)
    changed = pictures.clone()
    changed[0, :, 20, 10] += 5
    before, after = discriminator(pictures), discriminator(changed)
    assert before.shape == (2, 1, 16, 8)
    where = (before != after).nonzero()
    assert len(where) and (where[:, 0] == 0).all() and ((4 * where[:, 2] + 2 - 20).abs() <= 9).all() and ((4 * where[:, 3] + 2 - 10).abs() <= 9).all()


def test_fooling_trains_the_maker_alone():
    torch.manual_seed(0)
    discriminator, maker = PatchDiscriminator(channels=8), nn.Conv2d(3, 3, 1)
    fooling = fooling_loss(discriminator, maker(torch.randn(2, 3, 16, 16)))
    fooling.backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad.abs().sum() > 0 for p in maker.parameters())


def test_with_its_weight_the_fooling_pulls_as_hard_as_the_reconstruction():
    torch.manual_seed(0)
    last, x = nn.Conv2d(3, 3, 1), torch.randn(2, 3, 16, 16)
    made = last(x)
    reconstruction, fooling = 7 * (made - x).square().mean(), fooling_loss(PatchDiscriminator(channels=8), made)
    weight = adaptive_weight(reconstruction, fooling, last.weight)
    one, other = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (reconstruction, weight * fooling))
    assert one.item() == pytest.approx(other.item(), rel=1e-2) and not weight.requires_grad


def test_the_weight_is_bounded_where_nothing_is_to_be_fooled():
    last = nn.Conv2d(1, 1, 1)
    made = last(torch.ones(1, 1, 2, 2))
    assert adaptive_weight(1e6 * made.sum(), 0 * made.sum(), last.weight) == 1e4
