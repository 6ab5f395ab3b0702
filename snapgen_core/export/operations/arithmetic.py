"""Arithmetic: element by element, and along axes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import ints, per_channel

# --------------------------------------------------------------------------------------------------------- elementwise


def gelu(x: Tensor, mode: str) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x < 0, x * per_channel(alpha, x), x)


ELEMENTWISE: dict[str, Callable] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": lambda x, y: torch.remainder(x, y),
    "pow": lambda x, y: x**y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "logical_not": lambda x: ~x,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "identity": lambda x: x,
    "cast": lambda x: x,
    "abs": lambda x: x.abs(),
    "sign": lambda x: x.sign(),
    "square": lambda x: x * x,
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "inverse": lambda x, epsilon: (x + epsilon).reciprocal(),
    "exp": lambda x: x.exp(),
    "exp2": lambda x: torch.exp2(x),
    "log": lambda x, epsilon: (x + epsilon).log(),
    "erf": lambda x: x.erf(),
    "floor": lambda x: x.floor(),
    "ceil": lambda x: x.ceil(),
    "round": lambda x: x.round(),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "threshold": lambda x, alpha: torch.maximum(x, alpha),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "tan": lambda x: x.tan(),
    "asin": lambda x: x.asin(),
    "acos": lambda x: x.acos(),
    "atan": lambda x: x.atan(),
    "sinh": lambda x: x.sinh(),
    "cosh": lambda x: x.cosh(),
    "tanh": lambda x: x.tanh(),
    "atanh": lambda x: x.atanh(),
    "relu": lambda x: x.relu(),
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x, alpha: torch.where(x < 0, x * alpha, x),
    "prelu": prelu,
    "elu": lambda x, alpha: torch.where(x < 0, alpha * torch.expm1(x), x),
    "gelu": gelu,
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros(())),
    "softsign": lambda x: x / (1 + x.abs()),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "scaled_tanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "softmax": lambda x, axis: x.softmax(int(axis)),
}


# ---------------------------------------------------------------------------------------------------------- reductions


def reduction(function: Callable, x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return function(x, list(range(x.dim())) if axes is None else ints(axes), bool(keep_dims))


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):  # torch multiplies along one axis at a time
        x = x.prod(axis, keep)
    return x


def cumsum(x: Tensor, axis: Tensor, exclusive: Tensor, reverse: Tensor) -> Tensor:
    axis = int(axis)
    x = x.flip(axis) if reverse else x
    if exclusive:  # each element's sum is that of the elements before it
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    x = x.cumsum(axis)
    return x.flip(axis) if reverse else x


REDUCTIONS: dict[str, Callable] = {
    "reduce_mean": partial(reduction, lambda x, axes, keep: x.float().mean(axes, keep)),
    "reduce_sum": partial(reduction, torch.sum),
    "reduce_prod": partial(reduction, product),
    "reduce_max": partial(reduction, torch.amax),
    "reduce_min": partial(reduction, torch.amin),
    "reduce_l1_norm": partial(reduction, lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": partial(reduction, lambda x, axes, keep: (x * x).sum(axes, keep).sqrt()),
    "reduce_sum_square": partial(reduction, lambda x, axes, keep: (x * x).sum(axes, keep)),
    "reduce_log_sum": partial(reduction, lambda x, axes, keep: x.sum(axes, keep).log()),
    "reduce_log_sum_exp": partial(reduction, torch.logsumexp),
    "reduce_argmax": lambda x, axis, keep_dims: x.argmax(int(axis), bool(keep_dims)),
    "reduce_argmin": lambda x, axis, keep_dims: x.argmin(int(axis), bool(keep_dims)),
    "cumsum": cumsum,
}

ARITHMETIC = ELEMENTWISE | REDUCTIONS
