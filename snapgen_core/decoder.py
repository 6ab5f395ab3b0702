"""TinyDecoder: the decoder of Sec. 3.2, and with its switches every step from SD3's decoder to it.

Start from SD3's decoder and
  (1) remove the attention                                        `attention`
  (2) keep GroupNorm in the coarsest stage only                   `norm`
  (3) make it thinner, and convolutions separable                 `channels`, `separable_conv`
  (4) keep fewer residual blocks, above all in the fine stages    `blocks`, `middle`
  (5) change the width while upsampling, not in residual blocks   `conv_shortcut`
The numbers are those of the list in Sec. 3.2.

Where the paper says nothing: widths and blocks are chosen so that both published totals come out, and for that the
convolutions of the upsampling layers stay dense, as `conv_in` and `conv_out` do; norms in the coarsest stage are the
cheapest that see the whole picture, and leave the fine stages local.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .errors import UserError
from .scales import DECODER_PRESETS
from .unet.blocks import conv3x3

Layer = Callable[[Tensor], Tensor]
NORMS = ("all", "minimal", "none")


class LatentRangeWarning(UserWarning):
    """A latent that is far from mean 0 and standard deviation 1: probably one that nobody has normalised."""


class ResidualBlock(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W): two 3x3 convolutions, each behind a SiLU, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, separable: bool, groups: int | None):
        super().__init__()
        self.norm1 = norm_layer(in_channels, groups)
        self.conv1 = conv3x3(in_channels, out_channels, separable)
        self.norm2 = norm_layer(out_channels, groups)
        self.conv2 = conv3x3(out_channels, out_channels, separable)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


def norm_layer(channels: int, groups: int | None) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


class PixelAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): every pixel reads every other, with one head of width C. Step (1) removes it."""

    def __init__(self, channels: int, groups: int | None):
        super().__init__()
        self.norm = norm_layer(channels, groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, S, C)
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # one head: (B, 1, S, C)
        read = self.to_out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + read.transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, 2H, 2W): every pixel becomes four, then a dense 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if on_cpu(x):
            return upsample_folded(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# Row p: which of the two rows under output row 2i + p each of the kernel's three rows falls on, once pixels are doubled.
_FOLD = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])


def upsample_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as `Upsample` says, with 4/9 of its arithmetic and without the doubled picture.

    Doubled pixels are equal, so where a 3x3 kernel meets the same pixel twice its weights can be added first. What is
    left is a 2x2 kernel for each of the four pixels that a pixel becomes.
    """
    height, width = x.shape[2:]
    fold = _FOLD.to(weight)
    kernels = torch.einsum("pkr,qls,oirs->pqoikl", fold, fold, weight).flatten(0, 2)  # (4 C_out, C_in, 2, 2)
    folded = F.conv2d(x, kernels, bias.repeat(4), padding=1).unflatten(1, (2, 2, -1))  # (B, 2, 2, C_out, H + 1, W + 1)
    out = x.new_empty(len(x), len(bias), 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)
    for p in range(2):
        for q in range(2):
            out[:, :, p::2, q::2] = folded[:, p, q, :, p : p + height, q : q + width]
    return out


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, 2H, 2W): one step finer, then residual blocks. The coarsest has no step."""

    def __init__(self, upsample: Upsample | None, blocks: list[ResidualBlock]):
        super().__init__()
        self.upsample = upsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.upsample is None else self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class TinyDecoderOutput(BaseOutput):
    """`sample` [B, 3, 8h, 8w]: the picture, in [-1, 1] where the latent is one."""

    sample: Tensor


class TinyDecoder(ModelMixin, ConfigMixin):
    """Latents to pictures (Sec. 3.2). The defaults are the paper's decoder; stages go from coarse to fine.

    Args:
        latent_channels: of the normalised latent (mean 0, standard deviation 1) that the denoiser makes.
        channels: width of each stage; each stage but the first doubles the size.
        blocks: residual blocks of each stage.
        middle: two more residual blocks before the first stage, as in SD3's decoder ...
        attention: ... and attention between them (1).
        norm: GroupNorm before every SiLU ("all"), in the coarsest stage only ("minimal"), or nowhere ("none") (2).
        separable_conv: make the 3x3 convolutions of residual blocks separable (3).
        conv_shortcut: change the width in a stage's first residual block, with a convolution as shortcut, and not in the
            upsampling layer before it (5).
        norm_groups: groups of every GroupNorm.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: tuple[int, ...] = (256, 224, 96, 96),
        blocks: tuple[int, ...] = (2, 2, 2, 1),
        middle: bool = False,
        attention: bool = False,
        norm: str = "minimal",
        separable_conv: bool = True,
        conv_shortcut: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()
        check_config(self.config)
        groups = [norm_groups if norm == "all" or norm == "minimal" and stage == 0 else None for stage in range(len(channels))]

        def block(width: int, stage: int) -> ResidualBlock:
            return ResidualBlock(width, channels[stage], separable_conv, groups[stage])

        width = channels[0]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid_block = nn.Sequential()
        if middle:
            between = [PixelAttention(width, groups[0])] if attention else []
            self.mid_block.extend([block(width, 0), *between, block(width, 0)])

        self.stages = nn.ModuleList()
        for stage, out in enumerate(channels):
            upsample = None
            if stage > 0:
                upsample = Upsample(width, width if conv_shortcut else out)
                width = upsample.conv.out_channels
            self.stages.append(Stage(upsample, [block(width if i == 0 else out, stage) for i in range(blocks[stage])]))
            width = out
        self.norm_out = norm_layer(width, groups[-1])
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    @classmethod
    def from_preset(cls, name: str) -> "TinyDecoder":
        """An untrained decoder of `snapgen_core.scales.DECODER_PRESETS`.

        Raises:
            UserError: no such preset.
        """
        if name not in DECODER_PRESETS:
            raise UserError(f"unknown decoder preset {name!r}: choose one of {', '.join(DECODER_PRESETS)}")
        return cls(**asdict(DECODER_PRESETS[name]))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "TinyDecoder":
        """diffusers' own, but safetensors only: other weight files are pickles, which can run code."""
        return super().from_pretrained(pretrained_model_name_or_path, **(kwargs | {"use_safetensors": True}))

    def forward(self, latent: Tensor, return_dict: bool = True) -> TinyDecoderOutput | tuple[Tensor]:
        """The picture [B, 3, 8h, 8w] of a normalised latent [B, C, h, w], any h and w.

        Warns:
            LatentRangeWarning: the latent looks as if nobody had normalised it.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        check_latent(self.config, latent)
        x = self.conv_in(latent.contiguous(memory_format=torch.channels_last))
        x = self.stages[0](self.mid_block(x))
        for stage in self.stages[1:-1]:
            x = self._finer((stage,), x)
        x = self._finer((self.stages[-1], self.norm_out, F.silu, self.conv_out), x)
        return TinyDecoderOutput(sample=x) if return_dict else (x,)

    def _finer(self, layers: Sequence[Layer], x: Tensor) -> Tensor:
        """One layer after the other; in bands where that is the same and nothing has to be kept for a backward pass."""
        if self.config.norm != "all" and not torch.is_grad_enabled() and on_cpu(x):
            return in_bands(layers, x)
        return run(layers, x)


def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def on_cpu(x: Tensor) -> bool:
    """Whether `x` is computed on a CPU at once, and not traced for an export or a compiler, which do better with the plain
    operations."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


BAND = 32  # rows: at 1024 pixels a band has tensors of up to 28 MB, which malloc can be told to keep (memory.py)


def in_bands(layers: Sequence[Layer], x: Tensor, rows: int = BAND) -> Tensor:
    """run(layers, x) for x (B, C, H, W), `rows` rows at a time, for layers that double the size and see few pixels.

    A picture of 1024 pixels has 400 MB in each tensor of the finest stage, a band of it 28. Every band is computed with
    the rows around it that it can see, so there are no seams: the numbers are those of the whole.
    """
    height = x.shape[2]
    modules = [module for layer in layers if isinstance(layer, nn.Module) for module in layer.modules()]
    # Each 3x3 convolution sees one row further, at the doubled size, where two rows are one of x.
    around = -(-sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in modules) // 2)
    out = None
    for top in range(0, height, rows):
        first = max(0, top - around)
        part = run(layers, x[:, :, first : top + rows + around])
        part = part[:, :, 2 * (top - first) : 2 * (top - first + rows)]
        if out is None:
            out = part.new_empty(len(x), part.shape[1], 2 * height, part.shape[3]).contiguous(memory_format=torch.channels_last)
        out[:, :, 2 * top : 2 * (top + rows)] = part
    return out


def check_config(config) -> None:
    """ValueError where the switches of `TinyDecoder` do not fit each other."""
    if len(config.channels) < 2:
        raise ValueError(f"a decoder needs at least two stages, got channels {tuple(config.channels)}")
    if len(config.blocks) != len(config.channels):
        raise ValueError(f"blocks needs a value for each of {len(config.channels)} stages, got {tuple(config.blocks)}")
    if config.norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {config.norm!r}")
    normed = {"all": config.channels, "minimal": config.channels[:1], "none": ()}[config.norm]
    if any(width % config.norm_groups for width in normed):
        raise ValueError(f"channels of stages with norms must be multiples of norm_groups={config.norm_groups}, got {tuple(normed)}")
    if config.attention and not config.middle:
        raise ValueError("attention sits between the two middle blocks: it needs middle=True")
    if config.conv_shortcut and not all(config.blocks):
        raise ValueError("with conv_shortcut a stage's first residual block changes the width: every stage needs one")


def check_latent(config, latent: Tensor) -> None:
    """ValueError for a latent that `TinyDecoder` cannot take, LatentRangeWarning for one that it would misread."""
    if latent.ndim != 4 or latent.shape[1] != config.latent_channels:
        raise ValueError(f"latent must be [B, {config.latent_channels}, h, w], got {list(latent.shape)}")
    if latent.is_meta or torch.compiler.is_compiling():  # no numbers to look at
        return
    if not latent.isfinite().all():
        raise ValueError(f"latent has {(~latent.isfinite()).sum()} numbers that are not finite: the denoiser has failed before the decoder")
    mean, std = latent.mean().item(), latent.std(correction=0).item()
    if latent.shape[2] * latent.shape[3] > 1 and (abs(mean) > 1 or not 1 / 3 < std < 3):
        warnings.warn(
            f"the latent has mean {mean:.2f} and standard deviation {std:.2f}, where 0 and 1 are expected: "
            "normalise it first, (z - shift_factor) * scaling_factor",
            LatentRangeWarning,
            stacklevel=3,
        )
