"""SnapGenUNet: the efficient denoiser of Sec. 3.1, and with its switches every step of the ablation in Fig. 2.

Start from a thin SDXL UNet (a) and
  (b) keep self-attention in the lowest resolution only          `self_attention`
  (c) make 3x3 convolutions separable, expanded inside a block   `separable_conv`, `expansion`
  (d) trim the feed-forward layers                               `ffn_ratio`
  (e) share one key/value head among all queries                 `kv_heads`
  (f) read the text in the first stage already                   `residual_blocks`, `transformer_depth`
  (g) normalise queries and keys, rotate them by position        `qk_norm`, `rope`

Names in shapes: B batch, C channels, H W height and width, S = H * W image tokens, L context tokens, D context width,
N heads, K key/value heads, E head width, T width of the timestep embedding.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .errors import UserError
from .scales import UNET_PRESETS

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions: Fig. 2 (c)
# ---------------------------------------------------------------------------------------------------------------------


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
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
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


def zero_init(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero the last layer of a residual branch, so that an untrained network is the identity plus nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: Fig. 2 (b), (e), (g)
# ---------------------------------------------------------------------------------------------------------------------


class Rope2d(nn.Module):
    """Cosines and sines of 2-D rotary positions: half of the rotated pairs turn with the row, half with the column.

    The angles of one axis are kept as a table of cosines and sines, outside the checkpoint. (Kept as frequencies, a cast
    to 16 bits would spoil every position; a rounded cosine is as exact as the queries that it multiplies.)
    """

    def __init__(self, head_dim: int, theta: float, positions: int = 256):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        cos, sin = self.axis(positions)
        self.register_buffer("cos", cos, persistent=False)  # (positions, E / 4)
        self.register_buffer("sin", sin, persistent=False)

    def axis(self, positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin (positions, E / 4) of position * theta^(-4 i / E), for i = 0 ... E/4 - 1."""
        steps = torch.arange(self.head_dim // 4, device=device, dtype=torch.float32)
        frequencies = self.theta ** (-4 * steps / self.head_dim)
        angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """cos, sin (S, 1, E / 2) for an image of height x width tokens, ready for queries (B, S, N, E)."""
        cos, sin = self.cos, self.sin
        if max(height, width) > len(cos):  # beyond 8,000 px: rare, so not worth keeping
            cos, sin = (table.to(self.cos.dtype) for table in self.axis(max(height, width), self.cos.device))
        return self.grid(cos, height, width), self.grid(sin, height, width)

    @staticmethod
    def grid(table: Tensor, height: int, width: int) -> Tensor:
        rows = table[:height, None].expand(-1, width, -1)
        columns = table[None, :width].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) of x (B, S, N, E) by the angles of cos, sin (S, 1, E / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given; multi-query where kv_heads = 1.

    With `qk_norm` queries and keys pass an RMSNorm over each head's width (it computes in fp32 at any precision), which
    keeps the softmax from saturating.
    """

    def __init__(self, channels: int, context_dim: int, head_dim: int, kv_heads: int | None, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.heads = channels // head_dim
        self.kv_heads = kv_heads or self.heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, self.kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, self.kv_heads * head_dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, S, C), context (B, L, D), rope = (cos, sin) (S, 1, E / 2) -> (B, S, C)."""
        source = x if context is None else context
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.heads, self.head_dim)))  # (B, S, N, E)
        k = self.norm_k(self.to_k(source).unflatten(-1, (self.kv_heads, self.head_dim)))  # (B, L, K, E)
        v = self.to_v(source).unflatten(-1, (self.kv_heads, self.head_dim))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # Heads that share keys and values are just more queries to them: no K or V is ever repeated, and with one
        # shared head (or none shared) nothing is copied either.
        group = self.heads // self.kv_heads
        q = q.unflatten(2, (self.kv_heads, group)).transpose(1, 2).flatten(2, 3)  # (B, K, S * N/K, E)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        out = out.unflatten(2, (x.shape[1], group)).transpose(1, 2).flatten(2)  # (B, S, C)
        return self.to_out(out)


class FeedForward(nn.Module):
    """GEGLU: (B, S, C) -> (B, S, C) through `ratio` * C gated channels. Fig. 2 (d)."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        hidden = int(channels * ratio)
        self.project_in = nn.Linear(channels, 2 * hidden)
        self.project_out = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.project_in(x).chunk(2, dim=-1)
        return self.project_out(x * F.gelu(gate))


class TransformerLayer(nn.Module):
    """Self-attention (where the stage has it), cross-attention, feed-forward; each behind a LayerNorm."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, kv_heads: int | None, ffn_ratio: float, qk_norm: bool, self_attention: bool):
        super().__init__()
        self.norm_self = nn.LayerNorm(channels) if self_attention else None
        self.self_attention = Attention(channels, channels, head_dim, kv_heads, qk_norm) if self_attention else None
        self.norm_cross = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, context_dim, head_dim, kv_heads, qk_norm)
        self.norm_ffn = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, ffn_ratio)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.self_attention is not None:
            x = x + self.self_attention(self.norm_self(x), rope=rope)
        x = x + self.cross_attention(self.norm_cross(x), context)
        return x + self.ffn(self.norm_ffn(x))


class Transformer(nn.Module):
    """(B, C, H, W), (B, L, D) -> (B, C, H, W): `depth` layers over the pixels, between two projections."""

    def __init__(self, channels: int, depth: int, self_attention: bool, rope_theta: float | None, groups: int, **attention):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.project_in = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(TransformerLayer(channels, self_attention=self_attention, **attention) for _ in range(depth))
        self.project_out = nn.Linear(channels, channels)
        zero_init(self.project_out)
        # Text tokens have no place in the picture, so only self-attention turns with position.
        self.rope = Rope2d(attention["head_dim"], rope_theta) if self_attention and rope_theta else None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.project_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, S, C)
        rope = self.rope(height, width) if self.rope is not None else None
        for layer in self.layers:
            tokens = layer(tokens, context, rope)
        return x + self.project_out(tokens).transpose(1, 2).unflatten(2, (height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: how the parts follow each other
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W): convolutions, then the timestep, then the text.

    Without a residual block (Fig. 2 (e), "inject conditions to the first stage") a 1x1 convolution changes the width
    where it must, and the transformer does the rest.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, residual: bool, depth: int, conv: dict, transformer: dict):
        super().__init__()
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() finds and sets it
        if residual:
            self.features = ResidualBlock(in_channels, out_channels, **conv)
        else:
            self.features = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.time = nn.Linear(time_dim, out_channels)
        self.transformer = Transformer(out_channels, depth, **transformer) if depth else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.compute, x, time, context)
        return self.compute(x, time, context)

    def compute(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.features(x) + self.time(time)[:, :, None, None]
        return x if self.transformer is None else self.transformer(x, context)


class DownStage(nn.Module):
    """Blocks at one resolution, then (in all stages but the last) half of it. Every output is also a skip connection."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x, time, context)
            outputs.append(x)
        return outputs if self.downsample is None else [*outputs, self.downsample(x)]


class MidBlock(nn.Module):
    """The lowest resolution's own stage. Its output is the feature that distillation takes, by a forward hook."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, context)
        return x


class UpStage(nn.Module):
    """Blocks that take back one skip connection each, then (in all stages but the first) twice the resolution."""

    def __init__(self, blocks: list[Block], upsample: Upsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes its skip connections from the end of `skips`."""
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context)
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[-2:])


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids (B, dim) of timestep (B), always in fp32: t = 1000 sigma, periods from 2 pi to 2 pi * 10,000."""
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, device=timestep.device, dtype=torch.float32) / (dim // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SnapGenUNetOutput(BaseOutput):
    """`sample` [B, C, H, W]: the predicted velocity v = eps - x0 of Eq. 2."""

    sample: Tensor


class SnapGenUNet(ModelMixin, ConfigMixin):
    """The denoiser of Sec. 3.1. The defaults are the paper's text-to-image model; stages go from high resolution to low.

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
        rope_theta: ... with angles from 1 down to about 1 / rope_theta a pixel.
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
        check_config(channels, transformer_depth, self_attention, residual_blocks, head_dim, kv_heads, norm_groups, rope)
        conv = dict(separable=separable_conv, expansion=expansion, groups=norm_groups)
        attention = dict(context_dim=context_dim, head_dim=head_dim, kv_heads=kv_heads, ffn_ratio=ffn_ratio, qk_norm=qk_norm)

        def block(width: int, stage: int, with_transformer: bool = True) -> Block:
            transformer = dict(self_attention=self_attention[stage], rope_theta=rope_theta if rope else None, groups=norm_groups, **attention)
            depth = transformer_depth[stage] if with_transformer else 0
            return Block(width, channels[stage], time_embed_dim, residual_blocks[stage], depth, conv, transformer)

        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        width, skips = channels[0], [channels[0]]  # the width so far, and those of the skip connections
        self.down_blocks = nn.ModuleList()
        last = len(channels) - 1
        for stage, out in enumerate(channels):
            blocks = [block(width if i == 0 else out, stage) for i in range(layers_per_block)]
            self.down_blocks.append(DownStage(blocks, Downsample(out, separable_conv) if stage < last else None))
            skips += [out] * (layers_per_block + (stage < last))
            width = out

        self.mid_block = MidBlock([block(width, last), block(width, last, with_transformer=False)])

        self.up_blocks = nn.ModuleList()
        for stage in reversed(range(len(channels))):
            out = channels[stage]
            blocks = [block((width if i == 0 else out) + skips.pop(), stage) for i in range(layers_per_block + 1)]
            self.up_blocks.append(UpStage(blocks, Upsample(out, separable_conv) if stage > 0 else None))
            width = out

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
        time = timestep_embedding(timestep.expand(len(sample)), self.time_embed[0].in_features)
        time = self.time_embed(time.to(sample.dtype))

        x = self.conv_in(sample)
        skips = [x]
        for stage in self.down_blocks:
            skips += stage(skips[-1], time, encoder_hidden_states)
        x = self.mid_block(skips[-1], time, encoder_hidden_states)
        for stage in self.up_blocks:
            x = stage(x, time, encoder_hidden_states, skips)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return SnapGenUNetOutput(sample=x) if return_dict else (x,)


def check_config(channels, transformer_depth, self_attention, residual_blocks, head_dim, kv_heads, norm_groups, rope) -> None:
    """ValueError where the switches of `SnapGenUNet` do not fit each other."""
    per_stage = dict(transformer_depth=transformer_depth, self_attention=self_attention, residual_blocks=residual_blocks)
    for name, values in per_stage.items():
        if len(values) != len(channels):
            raise ValueError(f"{name} needs one value for each of the {len(channels)} stages, got {tuple(values)}")
    for width, depth, residual in zip(channels, transformer_depth, residual_blocks):
        if width % norm_groups or width % head_dim:
            raise ValueError(f"channels must be multiples of head_dim={head_dim} and norm_groups={norm_groups}, got {tuple(channels)}")
        if kv_heads and (width // head_dim) % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide the {width // head_dim} heads of a stage of {width} channels")
        if not depth and not residual:
            raise ValueError("a stage without residual blocks needs a transformer_depth of at least 1")
    if rope and head_dim % 4:
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
