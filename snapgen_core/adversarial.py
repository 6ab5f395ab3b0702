"""Adversarial losses. So far those of the decoder (Sec. 3.2): a patch discriminator, hinge losses, an adaptive weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


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
