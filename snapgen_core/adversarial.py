"""Adversarial losses: hinge losses, a discriminator of patches for the decoder (Sec. 3.2), and one of noisy latents for the
distillation to few steps (Sec. 3.4, Eq. 9)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import flow


class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] -> logits [B, 1, h, w]: each judges one patch as real or made [Isola et al. 2017].

    With two layers a patch is 18 pixels wide. No norms: batch norm lets the pictures of a batch betray each other, group
    norm the patches of a picture.
    """

    def __init__(self, channels: int = 32, layers: int = 2):
        super().__init__()
        blocks, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for _ in range(layers - 1):
            blocks += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)]
            width *= 2
        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss of logits: real ones are pushed above 1, made ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def fooling_loss(discriminator: nn.Module, made: Tensor) -> Tensor:
    """The maker's hinge loss. Its gradient reaches `made` and leaves the discriminator's weights alone."""
    frozen = {name: tensor.detach() for name, tensor in discriminator.state_dict(keep_vars=True).items()}
    return -functional_call(discriminator, frozen, (made,)).mean()


def adaptive_weight(reconstruction: Tensor, fooling: Tensor, last_layer: Tensor) -> Tensor:
    """The weight that makes both losses pull equally at the last layer [Esser et al. 2021, Eq. 7]; at most 10,000."""
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    fool = torch.autograd.grad(fooling, last_layer, retain_graph=True)[0].norm()
    return (pull / (fool + 1e-4)).clamp(max=1e4).detach()


# ------------------------------------------------------------------------------------------------- Eq. 9

# x_t [B,C,h,w], timestep [B], context, pooled, numbers of blocks -> their features, [B,D,H,W] each (`Teacher.block_features`)
BlockFeatures = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], list[Tensor]]


class Head(nn.Module):
    """A few linear layers on one block's features [B,D,H,W], told the noise level [B] and the prompt [B,P] -> logits [B,H,W].

    Every token gets a logit of its own. Beside a plain one there is one that asks whether it fits the condition
    [Miyato & Koyama 2018].
    """

    def __init__(self, features: int, pooled: int, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.inner = nn.Sequential(nn.Linear(features, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
        self.plain = nn.Linear(width, 1)
        self.condition = nn.Linear(pooled + 2, width)

    def forward(self, features: Tensor, sigma: Tensor, pooled: Tensor) -> Tensor:
        hidden = self.inner(self.norm(features.flatten(2).transpose(1, 2)))  # (B, N, width)
        level = torch.stack([sigma, sigma.square()], dim=1)
        asked = self.condition(torch.cat([pooled, level], dim=1))  # (B, width)
        fits = (hidden * asked[:, None]).sum(dim=2) / math.sqrt(hidden.shape[2])
        return (self.plain(hidden)[..., 0] + fits).unflatten(1, features.shape[2:])


class LatentDiscriminator(nn.Module):
    """D of Eq. 9: frozen features of a few-step teacher, and trained heads on several of its blocks [Sauer et al. 2024].

    forward(x_t [B,C,h,w], sigma [B], context [B,L,D], pooled [B,P]) -> logits [B, blocks, H, W]; high: taken for real.

    Args:
        features: how to get them; a function and no module, so that the teacher's weights are no part of this one's.
        width, pooled: D of the features, P.
        blocks: numbers of the blocks that are judged.
    """

    def __init__(self, features: BlockFeatures, width: int, pooled: int, blocks: Sequence[int]):
        super().__init__()
        self.features, self.blocks = features, tuple(blocks)
        self.heads = nn.ModuleList(Head(width, pooled) for _ in blocks)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return self.judge(self.features(x, flow.TIMESTEPS * sigma, context, pooled, self.blocks), sigma, pooled)

    def judge(self, features: Sequence[Tensor], sigma: Tensor, pooled: Tensor) -> Tensor:
        """Logits of features: the trained part alone."""
        return torch.stack([head(found.float(), sigma, pooled.float()) for head, found in zip(self.heads, features)], dim=1)


def gradient_penalty(discriminator: LatentDiscriminator, features: Sequence[Tensor], sigma: Tensor, pooled: Tensor) -> Tensor:
    """R1 [Mescheder et al. 2018] on the heads' inputs [Sauer et al. 2023]: the mean squared slope of the logits of real
    samples. It keeps the discriminator from growing ever steeper where it is right already."""
    inputs = [found.detach().float().requires_grad_() for found in features]
    logits = discriminator.judge(inputs, sigma, pooled)
    slopes = torch.autograd.grad(logits.mean(dim=(2, 3)).sum(), inputs, create_graph=True)
    return sum(slope.square().flatten(1).sum(1) for slope in slopes).mean() / len(inputs)
