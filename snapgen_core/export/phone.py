"""The student and the decoder as a phone's Neural Engine likes them: the same weights in another layout.

The engine works on maps (B, C, 1, S): channels first, one row, tokens along the last axis. So linear layers become 1x1
convolutions, attention is computed head by head on such maps [Apple 2022, "Deploying Transformers on the Apple Neural
Engine"], every shape is fixed, and the norms are written so that no square leaves the range of 16 bits, which ends at 65,504.

Names in shapes: B batch, C channels, S = H * W image tokens, L text tokens, D text width, E head width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..unet import SnapGenUNet
from ..unet.attention import Attention, FeedForward, Transformer, TransformerLayer


LARGEST = 65504.0  # of 16 bits


def as_conv(linear: nn.Linear) -> nn.Conv2d:
    """The 1x1 convolution with a linear layer's weights."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
    conv.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach())
    return conv


def normalise(x: Tensor, dims: tuple[int, ...], eps: float, centre: bool) -> Tensor:
    """x over its root mean square along `dims`, with `centre` after taking off the mean; in 16 bits as well.

    Values above 255 have squares beyond 16 bits. So all are divided by the largest first, where it is above 1; eps, which is
    meant for the undivided ones, is divided along.
    """
    if centre:
        x = x - x.mean(dims, keepdim=True)
    largest = x.abs().amax(dims, keepdim=True).clamp(1.0, LARGEST)  # without the second bound Core ML would store infinity
    x = x / largest
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps / largest.square())


class PhoneGroupNorm(nn.Module):
    """GroupNorm of (B, C, H, W)."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = (nn.Parameter(p.detach()[None, :, None, None]) for p in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, x.shape[2] * x.shape[3])
        return normalise(grouped, (2, 3), self.eps, centre=True).reshape(x.shape) * self.weight + self.bias


class PhoneLayerNorm(nn.Module):
    """LayerNorm over the channels of (B, C, 1, S)."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = (nn.Parameter(p.detach()[None, :, None, None]) for p in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, (1,), self.eps, centre=True) * self.weight + self.bias


class PhoneRmsNorm(nn.Module):
    """RMSNorm over the channels of one head's queries or keys, (B, E, 1, S)."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach()[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, (1,), self.eps, centre=False) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on maps: the pairs (x_i, x_{i + E/2}) of (B, E, 1, S) by the angles of cos, sin (1, E/2, 1, S)."""
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=1)


class PhoneAttention(nn.Module):
    """`Attention` on maps, head by head: queries (B, E, 1, S) and shared keys (B, E, 1, T) give (B, T, 1, S)."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (as_conv(layer) for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out))
        self.norm_q, self.norm_k = (PhoneRmsNorm(norm) if isinstance(norm, nn.RMSNorm) else nn.Identity() for norm in (attention.norm_q, attention.norm_k))

    def forward(self, x: Tensor, source: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens x (B, C, 1, S) read from `source` (B, D, 1, T)."""
        turn = (lambda y: rotate(y, *rope)) if rope is not None else (lambda y: y)
        queries = [turn(self.norm_q(q)) * self.head_dim**-0.5 for q in self.to_q(x).split(self.head_dim, dim=1)]
        keys = [turn(self.norm_k(k)).transpose(1, 3) for k in self.to_k(source).split(self.head_dim, dim=1)]  # (B, T, 1, E)
        values = self.to_v(source).split(self.head_dim, dim=1)
        group = self.heads // self.kv_heads
        read = []
        for number, query in enumerate(queries):
            weights = torch.einsum("bchq,bkhc->bkhq", query, keys[number // group]).softmax(dim=1)  # (B, T, 1, S)
            read.append(torch.einsum("bkhq,bchk->bchq", weights, values[number // group]))
        return self.to_out(torch.cat(read, dim=1))


class PhoneFeedForward(nn.Module):
    """`FeedForward` on (B, C, 1, S)."""

    def __init__(self, ffn: FeedForward):
        super().__init__()
        self.project_in, self.project_out = as_conv(ffn.project_in), as_conv(ffn.project_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.project_in(x).chunk(2, dim=1)
        return self.project_out(x * F.gelu(gate))


class PhoneTransformerLayer(nn.Module):
    def __init__(self, layer: TransformerLayer):
        super().__init__()
        self.self_attention = None
        if layer.self_attention is not None:
            self.norm_self, self.self_attention = PhoneLayerNorm(layer.norm_self), PhoneAttention(layer.self_attention)
        self.norm_cross, self.cross_attention = PhoneLayerNorm(layer.norm_cross), PhoneAttention(layer.cross_attention)
        self.norm_ffn, self.ffn = PhoneLayerNorm(layer.norm_ffn), PhoneFeedForward(layer.ffn)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.self_attention is not None:
            tokens = self.norm_self(x)
            x = x + self.self_attention(tokens, tokens, rope)
        x = x + self.cross_attention(self.norm_cross(x), context)
        return x + self.ffn(self.norm_ffn(x))


class PhoneTransformer(nn.Module):
    """`Transformer` for maps of one fixed size: (B, C, H, W) and the text (B, D, 1, L)."""

    def __init__(self, transformer: Transformer, height: int, width: int):
        super().__init__()
        self.norm = PhoneGroupNorm(transformer.norm)
        self.project_in, self.project_out = as_conv(transformer.project_in), as_conv(transformer.project_out)
        self.layers = nn.ModuleList(PhoneTransformerLayer(layer) for layer in transformer.layers)
        self.size = height, width
        self.turns = transformer.rope is not None
        if self.turns:
            for name, table in zip(("cos", "sin"), transformer.rope(height, width)):  # (S, 1, E / 2)
                self.register_buffer(name, table.permute(1, 2, 0)[:, :, None], persistent=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = self.size
        tokens = self.project_in(self.norm(x).reshape(x.shape[0], x.shape[1], 1, height * width))
        for layer in self.layers:
            tokens = layer(tokens, context, (self.cos, self.sin) if self.turns else None)
        return x + self.project_out(tokens).reshape(x.shape)


def replace_modules(parent: nn.Module, wanted: type, made) -> None:
    """Put made(child) in the place of every child of `parent`, at any depth, that is a `wanted`."""
    for name, child in parent.named_children():
        if isinstance(child, wanted):
            setattr(parent, name, made(child))
        else:
            replace_modules(child, wanted, made)


def map_sizes(unet: SnapGenUNet, side: int) -> dict[Transformer, tuple[int, int]]:
    """(H, W) at which each transformer works for latents of `side` pixels."""
    sizes, config = {}, unet.config
    hooks = [module.register_forward_pre_hook(lambda module, given: sizes.update({module: tuple(given[0].shape[2:])})) for module in unet.modules() if isinstance(module, Transformer)]
    with torch.no_grad():
        unet(torch.zeros(1, config.in_channels, side, side), torch.zeros(1), torch.zeros(1, 1, config.context_dim))
    for hook in hooks:
        hook.remove()
    return sizes


class PhoneUNet(nn.Module):
    """`SnapGenUNet` with the same weights for latents of one size.

    forward(sample [B, C, side, side], timestep [B] = 1000 sigma, context [B, D, 1, L]) -> velocity [B, C, side, side].
    """

    def __init__(self, unet: SnapGenUNet, side: int):
        super().__init__()
        unet = copy.deepcopy(unet).float().eval()
        sizes = map_sizes(unet, side)
        replace_modules(unet, Transformer, lambda module: PhoneTransformer(module, *sizes[module]))
        replace_modules(unet, nn.GroupNorm, PhoneGroupNorm)
        self.unet = unet
        self.requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet.velocity(sample, timestep, context)

    @torch.no_grad()
    def write_back(self, unet: SnapGenUNet) -> None:
        """Put these weights into a student in the training layout, which computes the same and is quicker off the engine."""
        own = unet.state_dict()
        unet.load_state_dict({name: value.reshape(own[name].shape) for name, value in self.unet.state_dict().items()})
