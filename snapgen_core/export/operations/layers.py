"""The layers of networks: products, convolutions, normalisation, pooling, resizing."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import ints, pad_last, per_channel

# ------------------------------------------------------------------------------------------------------------ products


def matmul(x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor) -> Tensor:
    return (x.mT if transpose_x and x.dim() > 1 else x) @ (y.mT if transpose_y and y.dim() > 1 else y)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


PRODUCTS: dict[str, Callable] = {
    "matmul": matmul,
    "linear": lambda x, weight, bias=None: x @ weight.mT if bias is None else x @ weight.mT + bias,
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "scaled_dot_product_attention": scaled_dot_product_attention,
}


# -------------------------------------------------------------------------------------------------------- convolutions


Pads = list[tuple[int, int]]  # what is added before and after each spatial axis


def padding(pad_type: str, pad: Tensor | None, sizes: list[int], windows: list[int], strides: list[int]) -> Pads:
    """`windows`: the kernel's extent along each axis, dilation included."""
    if pad_type == "custom":
        flat = ints(pad)
        return list(zip(flat[::2], flat[1::2]))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    pads = []
    for n, window, stride in zip(sizes, windows, strides):
        total = max(0, (math.ceil(n / stride) - 1) * stride + window - n)
        pads.append((total // 2, total - total // 2))
    return [(after, before) for before, after in pads] if pad_type == "same_lower" else pads


def conv(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    dilations: Tensor,
    groups: Tensor,
    pad: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    strides, dilations = ints(strides), ints(dilations)
    windows = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations)]
    pads = padding(pad_type, pad, list(x.shape[2:]), windows, strides)
    if any(before != after for before, after in pads):  # torch's own padding is the same on both sides
        x, pads = pad_last(x, pads), [(0, 0)] * len(pads)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, weight, bias, strides, [before for before, _ in pads], dilations, int(groups))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    dilations: Tensor,
    groups: Tensor,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The full product, then cut (or continued with zeros at its end) to the size that is wanted."""
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    strides = ints(strides)
    full = function(x, weight, None, strides, groups=int(groups), dilation=ints(dilations))
    sizes = list(full.shape[2:])
    starts = [0] * len(sizes)
    if pad_type == "custom":
        pads = padding(pad_type, pad, sizes, [], strides)
        starts, sizes = [before for before, _ in pads], [size - sum(pair) for size, pair in zip(sizes, pads)]
    if pad_type == "same":
        sizes = [n * stride for n, stride in zip(x.shape[2:], strides)]
    if output_shape is not None:
        sizes = ints(output_shape)[2:]
    if pad_type == "same":
        starts = [max(0, have - size) // 2 for have, size in zip(full.shape[2:], sizes)]
    out = pad_last(full, [(-start, start + size - have) for start, size, have in zip(starts, sizes, full.shape[2:])])
    return out if bias is None else out + per_channel(bias, out)


CONVOLUTIONS: dict[str, Callable] = {"conv": conv, "conv_transpose": conv_transpose}


# ------------------------------------------------------------------------------------------------------- normalisation


def normalise(x: Tensor, axes: list[int], epsilon: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance + epsilon).sqrt()


def affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def layer_norm(x: Tensor, axes: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    places = {axis % x.dim() for axis in ints(axes)}
    shape = [size if axis in places else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = (None if parameter is None else parameter.reshape(shape) for parameter in (gamma, beta))
    return affine(normalise(x, sorted(places), epsilon), gamma, beta)


def instance_norm(x: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    gamma, beta = (None if parameter is None else per_channel(parameter, x) for parameter in (gamma, beta))
    return affine(normalise(x, list(range(2, x.dim())), epsilon), gamma, beta)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    gamma, beta = (None if parameter is None else per_channel(parameter, x) for parameter in (gamma, beta))
    return affine((x - per_channel(mean, x)) / (per_channel(variance, x) + epsilon).sqrt(), gamma, beta)


NORMALISATION: dict[str, Callable] = {
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "l2_norm": lambda x, epsilon: x / ((x * x).sum((-3, -2, -1), keepdim=True) + epsilon).sqrt(),
}


# ------------------------------------------------------------------------------------------------------------- pooling


def completed(pads: Pads, sizes: list[int], kernel: list[int], strides: list[int]) -> Pads:
    """`ceil_mode`: pads that let the last, incomplete window in."""
    stretched = []
    for (before, after), n, window, stride in zip(pads, sizes, kernel, strides):
        steps = math.ceil((n + before + after - window) / stride)
        if before + after > 0 and steps * stride >= n + before:  # a window must begin inside the input or before it
            steps -= 1
        stretched.append((before, max(after, steps * stride + window - n - before)))
    return stretched


def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    ceil_mode: Tensor,
    exclude_padding_from_average: Tensor,
    pad: Tensor | None = None,
) -> Tensor:
    sizes, kernel, strides = list(x.shape[2:]), ints(kernel_sizes), ints(strides)
    plain = padding(pad_type, pad, sizes, kernel, strides)
    pads = completed(plain, sizes, kernel, strides) if ceil_mode else plain
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    # A mean over the elements that count: those of x, of its padding too if wanted, never those that `ceil_mode` added.
    counted = pad_last(torch.ones(1, 1, *sizes), plain, 0.0 if exclude_padding_from_average else 1.0)
    counted = pad_last(counted, [(0, after - usual) for (_, after), (_, usual) in zip(pads, plain)])
    return function(pad_last(x, pads), kernel, strides) / function(counted, kernel, strides)


def max_pool(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, ceil_mode: Tensor, pad: Tensor | None = None
) -> Tensor:
    sizes, kernel, strides = list(x.shape[2:]), ints(kernel_sizes), ints(strides)
    pads = padding(pad_type, pad, sizes, kernel, strides)
    pads = completed(pads, sizes, kernel, strides) if ceil_mode else pads
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    return function(pad_last(x, pads, -math.inf), kernel, strides)


POOLING: dict[str, Callable] = {"avg_pool": avg_pool, "max_pool": max_pool}


# ------------------------------------------------------------------------------------------------------------ resizing


def positions(old: int, new: int, mode: str) -> Tensor:
    """Where each of `new` elements lies among `old` ones: (new), from 0 to old - 1. `mode`: MIL's sampling modes."""
    i = torch.arange(new, dtype=torch.float64)  # fp32 would miss whole positions by a hair, and nearest the neighbour
    if mode == "DEFAULT":
        at = i * old / new
    elif mode == "UNALIGN_CORNERS":
        at = (i + 0.5) * old / new - 0.5
    elif mode == "OFFSET_CORNERS":
        at = (i + 0.5) * max(1, old - 1) / new
    elif new > 1:  # both kinds of aligned corners
        at = i * (old - 1) / (new - 1)
    else:
        at = i + (old - 1) / 2 if mode == "ALIGN_CORNERS" else i
    return at.clamp(0, old - 1)


def nearest(x: Tensor, axis: int, new: int, mode: str = "DEFAULT") -> Tensor:
    """The documentation is silent about ties and rounding: as torch's `nearest`, and `nearest-exact` for UNALIGN_CORNERS."""
    at = positions(x.shape[axis], new, mode)
    return x.index_select(axis, (at if mode == "DEFAULT" else at + 0.5).floor().long())


def linear(x: Tensor, axis: int, new: int, mode: str) -> Tensor:
    at = positions(x.shape[axis], new, mode)
    lower = at.floor().long()
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    share = (at - lower).float().reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))
    return x.index_select(axis, lower) * (1 - share) + x.index_select(axis, upper) * share


def scaled(size: int, factor: Tensor) -> int:
    return int((factor * size).floor())  # in the factor's own precision, as the package's shapes were found


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor) -> Tensor:
    x = nearest(x, -2, scaled(x.shape[-2], scale_factor_height))
    return nearest(x, -1, scaled(x.shape[-1], scale_factor_width))


def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    return nearest(nearest(x, -2, int(target_size_height)), -1, int(target_size_width))


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor,
    scale_factor_width: Tensor,
    align_corners: Tensor,
    half_pixel_centers: Tensor | None = None,
) -> Tensor:
    centred = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    x = linear(x, -2, scaled(x.shape[-2], scale_factor_height), mode)
    return linear(x, -1, scaled(x.shape[-1], scale_factor_width), mode)


def resize_bilinear(x: Tensor, target_size_height: Tensor, target_size_width: Tensor, sampling_mode: str) -> Tensor:
    return linear(linear(x, -2, int(target_size_height), sampling_mode), -1, int(target_size_width), sampling_mode)


def resize(x: Tensor, shape: Tensor, resized_dims: Tensor, interpolation_mode: str, sampling_mode: str) -> Tensor:
    count = int(resized_dims)
    for axis, new in zip(range(x.dim() - count, x.dim()), ints(shape)[-count:]):
        if new:  # 0 keeps the size
            x = (linear if interpolation_mode == "LINEAR" else nearest)(x, axis, new, sampling_mode)
    return x


RESIZING: dict[str, Callable] = {
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "resize_bilinear": resize_bilinear,
    "resize": resize,
}

LAYERS = PRODUCTS | CONVOLUTIONS | NORMALISATION | POOLING | RESIZING
