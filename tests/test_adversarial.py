"""Adversarial losses and discriminators: by hand, and each gradient where it belongs."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from snapgen_core.adversarial import LatentDiscriminator, PatchDiscriminator, adaptive_weight, discriminator_loss, fooling_loss, gradient_penalty
from snapgen_core.scales import SCALES
from snapgen_core.teachers import Teacher


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


# ------------------------------------------------------------------------------------------------- Eq. 9


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher(SD3Transformer2DModel(**SCALES["tiny"].teacher | {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 64}))


def asked(count=2):
    normal = torch.Generator().manual_seed(1)
    return torch.randn(count, 16, 8, 8, generator=normal), torch.tensor([0.0, 0.75])[:count], torch.randn(count, 48, 384, generator=normal), torch.randn(count, 256, generator=normal)


def judging(teacher, blocks=(0, 2)):
    torch.manual_seed(2)
    return LatentDiscriminator(teacher.block_features, 64, 256, blocks)


def test_the_features_of_blocks_are_those_that_pass_there(teacher):
    x, sigma, context, pooled = asked()
    first, last = teacher.block_features(x, 1000 * sigma, context, pooled, (0, 2))
    assert torch.equal(last, teacher(x, 1000 * sigma, context, pooled)[1])  # the last block's, as Eq. 5 takes them
    seen = []
    hook = teacher.transformer.transformer_blocks[1].register_forward_pre_hook(lambda block, given, named: seen.append(named["hidden_states"]), with_kwargs=True)
    teacher(x, 1000 * sigma, context, pooled)
    hook.remove()
    assert torch.equal(first.flatten(2).transpose(1, 2), seen[0])
    assert len(teacher.transformer.transformer_blocks[0]._forward_hooks) == 0


def test_a_logit_for_every_token_of_every_block_and_only_the_heads_are_trained(teacher):
    discriminator = judging(teacher)
    x, sigma, context, pooled = asked()
    x.requires_grad_()
    logits = discriminator(x, sigma, context, pooled)
    assert logits.shape == (2, 2, 8, 8)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())
    assert {name.split(".")[0] for name, _ in discriminator.named_parameters()} == {"heads"}
    assert all(p.grad is None for p in teacher.parameters())


def test_fooling_reaches_the_latent_through_the_frozen_teacher(teacher):
    discriminator = judging(teacher)
    x, sigma, context, pooled = asked()
    x.requires_grad_()
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    (-torch.func.functional_call(discriminator, frozen, (x, sigma, context, pooled)).mean()).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in (*discriminator.parameters(), *teacher.parameters()))


def test_logits_know_level_and_prompt(teacher):
    discriminator = judging(teacher)
    x, sigma, context, pooled = asked()
    features = [found.detach() for found in teacher.block_features(x, 1000 * sigma, context, pooled, (0, 2))]
    before = discriminator.judge(features, sigma, pooled)
    assert not torch.allclose(discriminator.judge(features, sigma + 0.2, pooled), before)
    assert not torch.allclose(discriminator.judge(features, sigma, pooled.roll(1, 0)), before)


def test_the_penalty_is_the_squared_slope(teacher):
    """Against finite differences of the mean logit, element by element, in double precision."""
    discriminator = judging(teacher, blocks=(1,))
    features = torch.randn(2, 64, 2, 2, generator=torch.Generator().manual_seed(3))
    sigma, pooled = torch.tensor([0.2, 0.9]), torch.randn(2, 256, generator=torch.Generator().manual_seed(4))
    penalty = gradient_penalty(discriminator, [features], sigma, pooled)
    assert penalty.requires_grad
    head, slopes = discriminator.heads[0].double(), torch.zeros(2, dtype=torch.float64)
    for i in range(features[0].numel()):
        step = torch.zeros_like(features, dtype=torch.float64)
        step.flatten(1)[:, i] = 1e-5
        up, down = (head(features + sign * step, sigma.double(), pooled.double()).mean(dim=(1, 2)) for sign in (1, -1))
        slopes += ((up - down) / 2e-5).square().detach()
    assert penalty.item() == pytest.approx(slopes.mean().item(), rel=1e-3)
