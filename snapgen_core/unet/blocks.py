"""Convolutions, with the switch of step (c), and how blocks and stages are put together, with that of (f); the steps are listed
in `network.py`.

Names in shapes: B batch, C channels, H W height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Transformer, zero_init


def conv3x3(in_channels: int, out_channels: int, separable: bool, stride: int = 1) -> nn.Module:
    """A dense 3x3 convolution, or its separable form: depthwise 3x3, then pointwise 1x1.

    The depthwise half has no bias: the pointwise one would only add another constant to it.
    """
    if not separable:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1),
    )


class ResidualBlock(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W): two 3x3 convolutions beside a shortcut.

    Separable and expanded it is the Universal Inverted Bottleneck: the first pointwise convolution widens to
    `expansion` times the wider side, the second one narrows to C_out.
    """

    def __init__(self, in_channels: int, out_channels: int, separable: bool, expansion: float, groups: int):
        super().__init__()
        hidden = int(expansion * max(in_channels, out_channels)) if separable else out_channels
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = conv3x3(in_channels, hidden, separable)
        self.norm2 = nn.GroupNorm(groups, hidden)
        self.conv2 = conv3x3(hidden, out_channels, separable)
        zero_init(self.conv2[-1] if separable else self.conv2)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()  # a backward pass needs what came in, and would have it copied
        h = self.conv1(F.silu(self.norm1(x), in_place))
        h = self.conv2(F.silu(self.norm2(h), in_place))
        return self.shortcut(x) + h


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, channels: int, separable: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels, separable, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, *size), where size is at most twice (H, W): an odd skip connection is one pixel short."""

    def __init__(self, channels: int, separable: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels, separable)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x[..., : size[0], : size[1]])


class Block(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W): convolutions, then the timestep, then the text.

    `features` is a `ResidualBlock`; in stages without them (step (f), the text from the first stage on) it only
    changes the width where it must, and the transformer does the rest.
    """

    def __init__(self, features: nn.Module, time: nn.Linear, transformer: Transformer | None):
        super().__init__()
        self.features = features
        self.time = time
        self.transformer = transformer

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.features(x) + self.time(time)[:, :, None, None]
        return x if self.transformer is None else self.transformer(x, context)


class Stage(nn.Module):
    """Blocks at one resolution. With gradient checkpointing each is computed again in the backward pass, not kept."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() finds and sets it

    def run(self, block: Block, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, time, context)
        return block(x, time, context)


class DownStage(Stage):
    """Ends (except in the last stage) with a step to half the size. Every output is a skip connection, too."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None):
        super().__init__(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            x = self.run(block, x, time, context)
            outputs.append(x)
        return outputs if self.downsample is None else [*outputs, self.downsample(x)]


class MidBlock(Stage):
    """At the lowest resolution, between the way down and the way up."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x, time, context)
        return x


class UpStage(Stage):
    """Takes back one skip connection a block, and ends (except in the first stage) with a step to twice the size."""

    def __init__(self, blocks: list[Block], upsample: Upsample | None):
        super().__init__(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Removes the skip connections that it takes from the end of `skips`."""
        for block in self.blocks:
            x = self.run(block, torch.cat([x, skips.pop()], dim=1), time, context)
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[-2:])
