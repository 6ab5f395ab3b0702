"""What operations of several kinds need."""

import torch.nn.functional as F
from torch import Tensor


def ints(x: Tensor) -> list[int]:
    """Axes, sizes, strides: tensors in a package, numbers to torch."""
    return x.flatten().tolist()


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """(C) -> (C, 1, ..., 1), to go with x (N, C, ...)."""
    return parameter.reshape(-1, *[1] * (x.dim() - 2))


def pad_last(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Add (before, after) elements to each of the last axes of x. A negative number takes elements away."""
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)  # torch begins with the last axis
