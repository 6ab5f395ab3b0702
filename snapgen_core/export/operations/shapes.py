"""Shapes and places: what moves numbers and leaves them as they are."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .common import ints, pad_last

# -------------------------------------------------------------------------------------------------------------- shapes


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape)
    # A 0 stands for the size of x at the same place counted from the last axis, and for 1 where x has no such axis.
    known = [1] * max(0, len(sizes) - x.dim()) + list(x.shape[max(0, x.dim() - len(sizes)) :])
    return x.reshape([size or known[place] for place, size in enumerate(sizes)])


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def concat(values: tuple[Tensor, ...], axis: Tensor, interleave: Tensor) -> Tensor:
    axis = int(axis)
    if values[0].dim() == 0:
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    axis = int(axis)
    return x.split(x.shape[axis] // int(num_splits) if split_sizes is None else ints(split_sizes), axis)


def slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> tuple[list[range], list[int]]:
    """The indices that a slice takes along each axis, and the axes that it drops."""
    begin_mask, end_mask, squeeze_mask = (
        [False] * x.dim() if mask is None else mask.tolist() for mask in (begin_mask, end_mask, squeeze_mask)
    )
    strides = [1] * x.dim() if stride is None else ints(stride)
    ranges = []
    for axis, (size, first, last, step) in enumerate(zip(x.shape, ints(begin), ints(end), strides)):
        first = None if begin_mask[axis] else first
        if squeeze_mask[axis]:
            first = (first or 0) % size
            ranges.append(range(first, first + 1))
        else:
            ranges.append(range(*slice(first, None if end_mask[axis] else last, step).indices(size)))
    return ranges, [axis for axis, dropped in enumerate(squeeze_mask) if dropped]


def slice_by_index(x: Tensor, **where: Tensor) -> Tensor:
    ranges, dropped = slices(x, **where)
    for axis, taken in enumerate(ranges):
        if taken.step < 0:  # torch has no slices that run backwards
            x = x.index_select(axis, torch.tensor(taken, dtype=torch.long))
        else:
            x = x[(slice(None),) * axis + (slice(taken.start, taken.stop, taken.step),)]
    return x.squeeze(dropped)


def slice_update(x: Tensor, update: Tensor, **where: Tensor) -> Tensor:
    ranges, _ = slices(x, **where)
    places = torch.meshgrid(*(torch.tensor(taken, dtype=torch.long) for taken in ranges), indexing="ij")
    x = x.clone()
    x[places] = update.reshape(places[0].shape)
    return x


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, length) in enumerate(zip(ints(begin), ints(size))):
        first %= x.shape[axis]
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    return pad_last(x, [tuple(-n for n in ints(cropped)) for cropped in (crop_height, crop_width)])


def pad(x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    pads = list(zip(ints(pad)[::2], ints(pad)[1::2]))
    if mode == "constant":
        return pad_last(x, pads, constant_val.item())
    for axis, (before, after) in enumerate(pads, start=x.dim() - len(pads)):
        last = x.shape[axis] - 1
        index = torch.arange(-before, last + 1 + after)
        index = index.clamp(0, last) if mode == "replicate" else last - (last - index.abs()).abs()
        x = x.index_select(axis, index)
    return x


def band_part(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])  # how far below the diagonal
    kept = ((below <= lower) | (lower < 0)) & ((-below <= upper) | (upper < 0))
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def one_hot(indices: Tensor, one_hot_vector_size: Tensor, axis: Tensor, on_value: Tensor, off_value: Tensor) -> Tensor:
    axis = int(axis) % (indices.dim() + 1)
    places = torch.arange(int(one_hot_vector_size)).reshape(-1, *[1] * (indices.dim() - axis))
    return torch.where(indices.unsqueeze(axis) == places, on_value, off_value)


MOVES: dict[str, Callable] = {
    "reshape": reshape,
    "transpose": lambda x, perm: x.permute(ints(perm)),
    "expand_dims": expand_dims,
    "squeeze": lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(ints(axes)),
    "concat": concat,
    "stack": lambda values, axis: torch.stack(values, int(axis)),
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "crop": crop,
    "pad": pad,
    "tile": lambda x, reps: x.repeat(ints(reps)),
    "reverse": lambda x, axes=None: x.flip(list(range(x.dim())) if axes is None else ints(axes)),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, int(upscale_factor)),
    "pixel_unshuffle": lambda x, downscale_factor: F.pixel_unshuffle(x, int(downscale_factor)),
    "shape": lambda x: torch.tensor(x.shape),
    "fill": lambda shape, value: value.expand(ints(shape)),
    "fill_like": lambda ref_tensor, value: value.expand(ref_tensor.shape),
    "range_1d": lambda start, end, step: torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype),
    "band_part": band_part,
    "one_hot": one_hot,
}


# -------------------------------------------------------------------------------------------------- gather and scatter


def from_front(indices: Tensor, size: int) -> Tensor:
    """Indices up to iOS16 may count from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


def gather(x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor | None = None) -> Tensor:
    axis, batch = int(axis) % x.dim(), 0 if batch_dims is None else int(batch_dims)
    if batch:  # one gather for each element of the leading axes
        pairs = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1))
        picked = torch.stack([gather(part, places, torch.tensor(axis - batch)) for part, places in pairs])
        return picked.unflatten(0, x.shape[:batch])
    picked = x.index_select(axis, from_front(indices, x.shape[axis]).flatten())
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
    return x.gather(int(axis), from_front(indices, x.shape[int(axis)]))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: Tensor | None = None) -> Tensor:
    batch = 0 if batch_dims is None else int(batch_dims)
    if batch:
        pairs = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1))
        return torch.stack([gather_nd(part, places) for part, places in pairs]).unflatten(0, x.shape[:batch])
    return x[indices.long().unbind(-1)]


# numpy's, because they add up what falls on the same place twice
SCATTERED = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}


def scattered(data: Tensor, places: tuple, updates: Tensor, mode: str) -> Tensor:
    out = data.numpy().copy()
    if mode == "update":
        out[places] = updates.numpy()
    else:
        SCATTERED[mode].at(out, places, updates.numpy())
    return torch.from_numpy(out)


def scatter(data: Tensor, indices: Tensor, updates: Tensor, axis: Tensor, mode: str) -> Tensor:
    return scattered(data, (slice(None),) * (int(axis) % data.dim()) + (indices.numpy(),), updates, mode)


def scatter_along_axis(data: Tensor, indices: Tensor, updates: Tensor, axis: Tensor, mode: str) -> Tensor:
    places = list(np.indices(indices.shape))
    places[int(axis)] = indices.numpy()
    return scattered(data, tuple(places), updates, mode)


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, mode: str) -> Tensor:
    return scattered(data, tuple(places.numpy() for places in indices.unbind(-1)), updates, mode)


def argsort(x: Tensor, axis: Tensor, ascending: Tensor) -> Tensor:
    return x.argsort(dim=int(axis), descending=not ascending, stable=True)


def topk(x: Tensor, k: Tensor, axis: Tensor, ascending: Tensor, return_indices: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = int(axis)
    places = argsort(x, axis, ascending)
    places = places if int(k) == -1 else places.narrow(axis, 0, int(k))
    values = x.gather(axis, places)
    return (values, places) if return_indices is None or return_indices else (values,)


GATHER: dict[str, Callable] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "argsort": argsort,
    "topk": topk,
    "non_zero": lambda x: x.nonzero(),
}

SHAPES = MOVES | GATHER
