"""Attention with the switches of steps (b), (d), (e) and (g); the steps are listed in `network.py`.

Names in shapes: B batch, C channels, S = H * W image tokens, L context tokens, D context width, N heads,
K key/value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionOptions:
    """What all transformers of a network have in common; explained at `SnapGenUNet`."""

    context_dim: int
    head_dim: int
    kv_heads: int | None
    ffn_ratio: float
    qk_norm: bool
    rope_theta: float | None  # None: no rotary positions
    norm_groups: int


def zero_init(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero the last layer of a residual branch, so that untrained blocks only hand their input on."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class Rope2d(nn.Module):
    """Cosines and sines of 2-D rotary positions: half of the rotated pairs turn with the row, half with the column.

    One axis is kept as a table of cosines and sines, outside the checkpoint. (Kept as frequencies, a cast to 16 bits
    would spoil every position; a rounded cosine is as exact as the queries that it multiplies.)
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

    def __init__(self, channels: int, source_dim: int, options: AttentionOptions):
        super().__init__()
        self.head_dim = options.head_dim
        self.heads = channels // self.head_dim
        self.kv_heads = options.kv_heads or self.heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, self.kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(source_dim, self.kv_heads * self.head_dim, bias=False)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, S, C), context (B, L, D), rope = (cos, sin) (S, 1, E / 2) -> (B, S, C)."""
        return self.attend(x, *self.keys_and_values(x if context is None else context, rope), rope)

    def keys_and_values(self, source: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Of image or text tokens (B, L, D): two tensors (B, L, K, E)."""
        k = self.norm_k(self.to_k(source).unflatten(-1, (self.kv_heads, self.head_dim)))
        v = self.to_v(source).unflatten(-1, (self.kv_heads, self.head_dim))
        return k if rope is None else rotate(k, *rope), v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the tokens x (B, S, C) read from k and v (B, L, K, E): (B, S, C)."""
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.heads, self.head_dim)))  # (B, S, N, E)
        if rope is not None:
            q = rotate(q, *rope)
        # Heads that share keys and values are just more queries to them: no K or V is ever repeated, and with one
        # shared head (or none shared) nothing is copied either.
        group = self.heads // self.kv_heads
        q = q.unflatten(2, (self.kv_heads, group)).transpose(1, 2).flatten(2, 3)  # (B, K, S * N/K, E)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        out = out.unflatten(2, (x.shape[1], group)).transpose(1, 2).flatten(2)  # (B, S, C)
        return self.to_out(out)


class FeedForward(nn.Module):
    """GEGLU: (B, S, C) -> (B, S, C) through `ratio` * C gated channels. Step (d)."""

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

    def __init__(self, channels: int, self_attention: bool, options: AttentionOptions):
        super().__init__()
        self.norm_self = nn.LayerNorm(channels) if self_attention else None
        self.self_attention = Attention(channels, channels, options) if self_attention else None
        self.norm_cross = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, options.context_dim, options)
        self.norm_ffn = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, options.ffn_ratio)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.self_attention is not None:
            x = x + self.self_attention(self.norm_self(x), rope=rope)
        k, v = self.cross_attention.keys_and_values(context)

        def each_token(x: Tensor) -> Tensor:
            x = x + self.cross_attention.attend(self.norm_cross(x), k, v)
            return x + self.ffn(self.norm_ffn(x))

        return in_slices(each_token, x)


SLICE = 2048  # tokens


def in_slices(each_token: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """each_token(x) for x (B, S, C), where every token is treated by itself.

    The hidden channels of 128 x 128 tokens take 100 MB, which a CPU is slower to fetch from the system than to compute.
    Where nothing has to be kept for a backward pass they are made and used up slice by slice, in memory that it holds.
    """
    size = max(1, SLICE // len(x))
    if x.shape[1] <= size or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return each_token(x)
    out = torch.empty_like(x)
    for part, place in zip(x.split(size, dim=1), out.split(size, dim=1)):
        place.copy_(each_token(part))
    return out


class Transformer(nn.Module):
    """(B, C, H, W), (B, L, D) -> (B, C, H, W): `depth` layers over the pixels, between two projections."""

    def __init__(self, channels: int, depth: int, self_attention: bool, options: AttentionOptions):
        super().__init__()
        self.norm = nn.GroupNorm(options.norm_groups, channels)
        self.project_in = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(TransformerLayer(channels, self_attention, options) for _ in range(depth))
        self.project_out = nn.Linear(channels, channels)
        zero_init(self.project_out)
        # Text tokens have no place in the picture, so only self-attention turns with position.
        self.rope = Rope2d(options.head_dim, options.rope_theta) if self_attention and options.rope_theta else None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.project_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, S, C)
        rope = self.rope(height, width) if self.rope is not None else None
        for layer in self.layers:
            tokens = layer(tokens, context, rope)
        return x + self.project_out(tokens).transpose(1, 2).unflatten(2, (height, width))
