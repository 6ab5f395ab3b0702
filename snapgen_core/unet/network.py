"""SnapGenUNet: the efficient denoiser of Sec. 3.1, and with its switches every step of the ablation in Fig. 2.

Start from a thin SDXL UNet (a) and
  (b) keep self-attention in the lowest resolution only          `self_attention`
  (c) make 3x3 convolutions separable, expanded inside a block   `separable_conv`, `expansion`
  (d) trim the feed-forward layers                               `ffn_ratio`
  (e) share one key/value head among all queries                 `kv_heads`
  (f) read the text in the first stage already                   `residual_blocks`, `transformer_depth`
  (g) normalise queries and keys, rotate them by position        `qk_norm`, `rope`
The letters are ours, for the seven rows of the ablation in Fig. 3; Fig. 2 has no letter for (e), and calls (f) and (g)
there (e) and (f).

Where the paper says nothing or can be read in two ways: `conv_in` and `conv_out` stay dense, as so thin layers gain
nothing from being separable; the timestep is added behind a block's convolutions, so that blocks with and without them
take it alike; and there is no branch for CLIP's pooled features, for which the published size leaves no room.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import UserError
from ..scales import UNET_PRESETS
from .attention import AttentionOptions, Transformer, zero_init
from .blocks import Block, Downsample, DownStage, MidBlock, ResidualBlock, Upsample, UpStage


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids (B, dim) of timestep (B), always in fp32: t = 1000 sigma, periods from 2 pi to 2 pi * 10,000."""
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, device=timestep.device, dtype=torch.float32) / (dim // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass
class SnapGenUNetOutput(BaseOutput):
    """`sample` [B, C, H, W]: the predicted velocity v = eps - x0 of Eq. 2."""

    sample: Tensor


class SnapGenUNet(ModelMixin, ConfigMixin):
    """The denoiser of Sec. 3.1. The defaults are the paper's text-to-image model; stages go from fine to coarse.

    Args:
        in_channels, out_channels: of the latent.
        context_dim: width D of the text context.
        channels: width of each stage, multiples of `head_dim` and `norm_groups`.
        transformer_depth: layers of each stage's transformers; 0 means none.
        layers_per_block: blocks of a stage going down; one more going up.
        head_dim: width E of an attention head.
        time_embed_dim: width T of the timestep embedding.
        self_attention: stages whose transformers attend to the image itself (b).
        separable_conv: make 3x3 convolutions separable (c) ...
        expansion: ... and widen the inside of residual blocks this many times.
        ffn_ratio: width of the feed-forward layers over that of the stage (d).
        kv_heads: key/value heads of self- and cross-attention; 1 is multi-query, None one per head (e).
        residual_blocks: stages with residual blocks; the others are transformers alone (f).
        qk_norm: RMSNorm on queries and keys (g).
        rope: rotate queries and keys of self-attention by their 2-D position (g) ...
        rope_theta: ... by 1 radian a token in the fastest pair, down to almost 1 / rope_theta in the slowest.
        norm_groups: groups of every GroupNorm.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        context_dim: int = 2304,
        channels: tuple[int, ...] = (256, 512, 896),
        transformer_depth: tuple[int, ...] = (1, 2, 4),
        layers_per_block: int = 2,
        head_dim: int = 64,
        time_embed_dim: int = 1024,
        self_attention: tuple[bool, ...] = (False, False, True),
        separable_conv: bool = True,
        expansion: float = 2,
        ffn_ratio: float = 3,
        kv_heads: int | None = 1,
        residual_blocks: tuple[bool, ...] = (False, True, True),
        qk_norm: bool = True,
        rope: bool = True,
        rope_theta: float = 10_000.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        check_config(self.config)
        options = AttentionOptions(
            context_dim, head_dim, kv_heads, ffn_ratio, qk_norm, rope_theta if rope else None, norm_groups
        )

        def block(width: int, stage: int, depth: int) -> Block:
            """A block of `stage` that takes `width` channels, with a transformer of `depth` layers."""
            out = channels[stage]
            if residual_blocks[stage]:
                features = ResidualBlock(width, out, separable_conv, expansion, norm_groups)
            else:
                features = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
            transformer = Transformer(out, depth, self_attention[stage], options) if depth else None
            return Block(features, nn.Linear(time_embed_dim, out), transformer)

        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        width, skips = channels[0], [channels[0]]  # the width so far, and those of the skip connections
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList()
        for stage, out in enumerate(channels):
            blocks = [block(width if i == 0 else out, stage, transformer_depth[stage]) for i in range(layers_per_block)]
            self.down_blocks.append(DownStage(blocks, Downsample(out, separable_conv) if stage < last else None))
            skips += [out] * (layers_per_block + (stage < last))
            width = out

        self.mid_block = MidBlock([block(width, last, transformer_depth[last]), block(width, last, 0)])

        self.up_blocks = nn.ModuleList()
        for stage, out in reversed(list(enumerate(channels))):
            blocks = []
            for _ in range(layers_per_block + 1):
                blocks.append(block(width + skips.pop(), stage, transformer_depth[stage]))
                width = out
            self.up_blocks.append(UpStage(blocks, Upsample(out, separable_conv) if stage > 0 else None))

        self.norm_out = nn.GroupNorm(norm_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        zero_init(self.conv_out)

    @classmethod
    def from_preset(cls, name: str) -> "SnapGenUNet":
        """An untrained network of `snapgen_core.scales.UNET_PRESETS`.

        Raises:
            UserError: no such preset.
        """
        if name not in UNET_PRESETS:
            raise UserError(f"unknown UNet preset {name!r}: choose one of {', '.join(UNET_PRESETS)}")
        return cls(**asdict(UNET_PRESETS[name]))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SnapGenUNet":
        """diffusers' own, but safetensors only: other weight files are pickles, which can run code."""
        return super().from_pretrained(pretrained_model_name_or_path, **(kwargs | {"use_safetensors": True}))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> SnapGenUNetOutput | tuple[Tensor]:
        """The velocity at `sample`.

        Args:
            sample: noisy latent [B, in_channels, H, W], any H and W.
            timestep: 1000 sigma, [B] or one number for all.
            encoder_hidden_states: text context [B, L, context_dim].

        Raises:
            ValueError: a shape that is not as above.
        """
        timestep = torch.as_tensor(timestep, device=sample.device)
        check_inputs(self.config, sample, timestep, encoder_hidden_states)
        velocity = self.velocity(sample, timestep.expand(len(sample)), encoder_hidden_states)
        return SnapGenUNetOutput(sample=velocity) if return_dict else (velocity,)

    def velocity(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """`forward` without its checks; what it does with the text is its transformers' affair."""
        time = timestep_embedding(timestep, self.time_embed[0].in_features)
        time = self.time_embed(time.to(sample.dtype))

        # Channels last from here on: a pixel's channels are then a token as it stands, and nothing is copied between
        # convolutions and transformers.
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for stage in self.down_blocks:
            skips += stage(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)
        for stage in self.up_blocks:
            x = stage(x, time, context, skips)
        return self.conv_out(F.silu(self.norm_out(x)))


def check_config(config) -> None:
    """ValueError where the switches of `SnapGenUNet` do not fit each other."""
    channels, head_dim, groups = tuple(config.channels), config.head_dim, config.norm_groups
    for name in ("transformer_depth", "self_attention", "residual_blocks"):
        if len(config[name]) != len(channels):
            raise ValueError(f"{name} needs a value for each of {len(channels)} stages, got {tuple(config[name])}")
    if any(width % head_dim or width % groups for width in channels):
        raise ValueError(f"channels must be multiples of head_dim={head_dim} and norm_groups={groups}, got {channels}")
    if config.kv_heads and any(width // head_dim % config.kv_heads for width in channels):
        raise ValueError(f"kv_heads={config.kv_heads} must divide the heads of every stage, channels / {head_dim}")
    if not all(depth or residual for depth, residual in zip(config.transformer_depth, config.residual_blocks)):
        raise ValueError("a stage without residual blocks needs a transformer_depth of at least 1")
    if config.rope and head_dim % 4:
        raise ValueError(f"rope needs a head_dim that is a multiple of 4, got {head_dim}")


def check_inputs(config, sample: Tensor, timestep: Tensor, context: Tensor) -> None:
    """ValueError where the inputs of `SnapGenUNet` have another shape than the model takes."""
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(f"sample must be [B, {config.in_channels}, H, W], got {list(sample.shape)}")
    batch = len(sample)
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != config.context_dim:
        raise ValueError(f"encoder_hidden_states must be [{batch}, L, {config.context_dim}], got {list(context.shape)}")
    if timestep.ndim and timestep.shape != (batch,):
        raise ValueError(f"timestep must be a number or [{batch}], got {list(timestep.shape)}")
