"""k-means of numbers: the few values that stand for all weights of a tensor with the least squared error.

In one dimension a cluster of the best clustering is an interval, so sorted values and a few edges among them are all there
is to find.
"""

from typing import NamedTuple

import numpy as np

from ..errors import UserError

CANDIDATES = 1024  # cells among whose edges the best clustering is searched for
HALF_MAX = 65504.0  # the largest float16


class Palette(NamedTuple):
    """A weight tensor in few bits: `values[indices]`."""

    values: np.ndarray  # [2^bits] float16, rising; entries that nothing needs repeat the last one
    indices: np.ndarray  # uint8, in the tensor's shape

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    def weight(self) -> np.ndarray:
        """The palettised tensor in float16."""
        return self.values[self.indices]


class _Sorted:
    """Sorted values with running sums, which tell mean and squared error of any interval of them at once.

    A cluster of optimal 1-D k-means is an interval, so `edges` (rising positions, from 0 to the number of values) are a
    whole clustering.
    """

    def __init__(self, values: np.ndarray):
        self.values = values.astype(np.float64)
        self.shift = self.values.mean()
        self.values -= self.shift  # else an error, a difference of sums of squares, would drown in their rounding
        self.sums = np.concatenate([[0.0], self.values.cumsum()])
        self.squares = np.concatenate([[0.0], np.square(self.values).cumsum()])

    def means(self, edges: np.ndarray) -> np.ndarray:
        return np.diff(self.sums[edges]) / np.diff(edges)

    def errors(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Squared error of each interval around its mean; infinite where it ends before it starts."""
        count, total = end - start, self.sums[end] - self.sums[start]
        error = np.maximum(self.squares[end] - self.squares[start] - total**2 / np.maximum(count, 1), 0)
        return np.where(count > 0, error, np.where(count == 0, 0, np.inf))


def kmeans_1d(values: np.ndarray, bits: int) -> Palette:
    """k-means of all `values` with 2^bits clusters: (palette [2^bits] float16, indices in the values' shape).

    Deterministic. Up to 1024 values, the clustering is optimal (before the palette is rounded to 16 bits). More are first
    cut into 1024 cells of about equal error; the best clustering with edges among theirs, found by dynamic programming
    (Wang and Song 2011, Ckmeans.1d.dp), is where Lloyd's iterations begin: so it has its clusters wherever the values
    have theirs, outliers included, which no random start promises.

    Raises:
        UserError: there are no values, some are not finite or not within float16, or bits are not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise UserError(f"a palette has indices of 1 to 8 bits, not {bits}")
    values = np.asarray(values, np.float32)
    if values.size == 0 or not np.abs(values).max() <= HALF_MAX:  # also where there is a NaN
        raise UserError("only weights that are finite, and within the range of 16-bit floats, can be palettised")
    ordered = np.sort(values, axis=None)
    distinct = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    if len(distinct) <= 2**bits:
        centroids = distinct
    else:
        ordered = _Sorted(ordered)
        edges = _lloyd(ordered, _best_edges(ordered, _cells(ordered), 2**bits))
        centroids = ordered.means(edges) + ordered.shift
    centroids = centroids.astype(np.float16) + np.float16(0)  # -0 becomes 0
    palette = np.pad(centroids, (0, 2**bits - len(centroids)), mode="edge")
    # Rounding has moved the centroids, so it is now that each value chooses its nearest.
    middles = (palette[1:].astype(np.float32) + palette[:-1]) / 2
    return Palette(palette, np.searchsorted(middles, values).astype(np.uint8))


def _cells(ordered: _Sorted) -> np.ndarray:
    """Edges of up to 1024 cells: those with the largest errors are halved at their means again and again."""
    size = len(ordered.values)
    if size <= CANDIDATES:
        return np.arange(size + 1)
    edges = np.array([0, size])
    while len(edges) <= CANDIDATES:
        middles = np.searchsorted(ordered.values, ordered.means(edges))
        errors = ordered.errors(edges[:-1], edges[1:])
        errors[(middles == edges[:-1]) | (middles == edges[1:])] = 0  # all its values are the same
        if not errors.any():
            break
        large = np.flatnonzero(errors >= errors.max() / 4)  # many at a time, and none that would be halved too early
        large = large[np.argsort(-errors[large], kind="stable")][: CANDIDATES + 1 - len(edges)]
        edges = np.sort(np.concatenate([edges, middles[large]]))
    return edges


def _best_edges(ordered: _Sorted, cells: np.ndarray, clusters: int) -> np.ndarray:
    """Of all ways to join neighbouring cells to so many clusters, the one with the least error.

    least[j], for m clusters of all that lies before edge j, is the minimum over i of least[i] for m - 1 clusters plus the
    error of one cluster from edge i to edge j.
    """
    between = ordered.errors(cells[None, :], cells[:, None]).astype(np.float32)  # [end, start]
    least, total, rows, starts = between[:, 0], np.empty_like(between), np.arange(len(cells)), []
    for _ in range(clusters - 1):
        np.add(between, least, out=total)
        starts.append(total.argmin(axis=1))
        least = total[rows, starts[-1]]
    edges = [len(cells) - 1]
    for start in reversed(starts):
        edges.append(start[edges[-1]])
    return np.unique(cells[[0, *edges]])


def _lloyd(ordered: _Sorted, edges: np.ndarray, tolerance: float = 1e-7) -> np.ndarray:
    """Lloyd's iterations until the error falls by less than `tolerance` of itself: new means, then edges half-way between
    them. Only edges move, so that an iteration costs 2^bits searches, however many values there are."""
    last, error = np.inf, ordered.errors(edges[:-1], edges[1:]).sum()
    while last - error > tolerance * error:
        means = ordered.means(edges)
        middles = (means[1:] + means[:-1]) / 2
        edges = np.unique(np.concatenate([[0], np.searchsorted(ordered.values, middles), [len(ordered.values)]]))
        last, error = error, ordered.errors(edges[:-1], edges[1:]).sum()
    return edges
