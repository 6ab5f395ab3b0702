"""Compressed weights: what a package stores in few bits and computes with in full.

The iOS16 and the iOS18 variants of an operation share a name; they differ in their parameters. Elements of fewer than 8
bits come packed in bytes in the former, one an element in the latter (coremltools unpacks those).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .common import ints


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits each from bytes: the lowest bit comes first, and numbers cross bytes."""
    stream = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    return torch.from_numpy(stream.astype(np.int64) @ (1 << np.arange(bits)))


def stretched(x: Tensor, sizes: list[int]) -> Tensor:
    """Repeat each element so that x has `sizes`: one parameter serves a block of elements."""
    for axis, size in enumerate(sizes):
        x = x.repeat_interleave(size // x.shape[axis], axis)
    return x


def lut_to_dense(indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None) -> Tensor:
    if shape is not None:  # iOS16: one table (P), packed indices
        sizes = ints(shape)
        return lut[unpacked(indices, (len(lut) - 1).bit_length(), int(np.prod(sizes)))].reshape(sizes)
    # iOS18: tables (..., P, V), one for each block of the indices; each entry a vector that runs along `vector_axis`.
    sizes = list(indices.shape)
    blocks = [torch.arange(size) // (size // tables) for size, tables in zip(sizes, lut.shape)]
    dense = lut[(*torch.meshgrid(*blocks, indexing="ij"), indices.long())]  # (*sizes, V)
    if lut.shape[-1] == 1:
        return dense.squeeze(-1)
    axis = int(vector_axis) % len(sizes)
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    if shape is not None:  # iOS16: packed bits
        sizes = ints(shape)
        mask = unpacked(mask, 1, int(np.prod(sizes))).reshape(sizes)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    sizes = list(data.shape)
    data = data.float() if offset is None else data.float() - stretched(offset, sizes)
    return stretched(scale, sizes) * data


def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    after = quantized_data.dim() - 1 - int(axis) % quantized_data.dim()
    zero_point, scale = (x.reshape(-1, *[1] * after) if x.dim() else x for x in (zero_point, scale))
    return scale * (quantized_data.float() - zero_point)


def lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = stretched(indices_mask, list(dense.shape))
    return mask, dense[mask.bool()]


def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


CONSTANTS: dict[str, Callable] = {
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_cast": lambda source_val: source_val,
}
