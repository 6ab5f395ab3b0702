"""k-means of weights against optimal clusterings, scikit-learn's and a published table."""

import numpy as np
import pytest

from snapgen_core.errors import UserError
from snapgen_core.export.kmeans import kmeans_1d

DRAWS = {
    "normal": lambda rng, n: 0.02 * rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(0.1, 0.1, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "outliers": lambda rng, n: 0.01 * rng.standard_t(1.5, n),
    "two lumps": lambda rng, n: np.where(rng.random(n) < 0.5, 0.01 * rng.standard_normal(n), 5 + rng.standard_normal(n)),
}


def weights(kind, count, seed=0):
    return DRAWS[kind](np.random.default_rng(seed), count).astype(np.float32)


def error(values, palette):
    return np.square(palette.weight().astype(np.float64) - values).sum()


def least_error(values, clusters):
    """Of every clustering of sorted values into intervals, cluster by cluster: the textbook recursion."""
    x = np.sort(values).astype(np.float64)
    x -= x.mean()
    cost = np.full((len(x) + 1, len(x) + 1), np.inf)  # of one cluster from i up to, without, j
    for i in range(len(x)):
        tail, count = x[i:], np.arange(1, len(x) - i + 1)
        cost[i, i + 1 :] = np.cumsum(tail**2) - np.cumsum(tail) ** 2 / count
    least = cost[0].copy()
    for _ in range(clusters - 1):
        least = (least[:, None] + cost).min(axis=0)
    return least[-1]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("count", "bits"), [(40, 1), (100, 4), (300, 5), (1500, 4)])
def test_kmeans_finds_the_optimum(kind, count, bits):
    """Within half a percent, although palettes are rounded to 16 bits, and the last case has more values than candidates."""
    values = weights(kind, count)
    best = least_error(values, 2**bits)
    assert 0.99 * best < error(values, kmeans_1d(values, bits)) < 1.005 * best


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("count", "bits", "starts"), [(20_000, 4, 2), (3_000, 8, 1)])
def test_kmeans_is_as_good_as_scikit_learns(kind, count, bits, starts):
    cluster = pytest.importorskip("sklearn.cluster")
    values = weights(kind, count)
    theirs = cluster.KMeans(2**bits, n_init=starts, random_state=0).fit(values[:, None].astype(np.float64)).inertia_
    assert error(values, kmeans_1d(values, bits)) < 1.01 * theirs


def test_a_million_normal_weights_have_the_textbook_error():
    """Max (1960), "Quantizing for minimum distortion", Table I: 0.009497 of the variance with 16 values."""
    values = weights("normal", 1_000_000)
    assert error(values, kmeans_1d(values, 4)) / len(values) / values.var() == pytest.approx(0.009497, rel=0.005)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_palettes_rise_and_every_value_has_its_nearest(bits):
    values = weights("outliers", 2_000).reshape(20, 10, 10)
    palette, indices = kmeans_1d(values, bits)
    assert palette.dtype == np.float16 and palette.shape == (2**bits,) and (np.diff(palette) >= 0).all()
    assert indices.dtype == np.uint8 and indices.shape == values.shape
    distances = np.abs(values[..., None] - palette.astype(np.float32))
    assert np.allclose(np.take_along_axis(distances, indices[..., None].astype(int), -1)[..., 0], distances.min(-1), rtol=1e-5)
    again = kmeans_1d(values, bits)
    assert np.array_equal(again.values, palette) and np.array_equal(again.indices, indices) and again.bits == bits


@pytest.mark.parametrize("values", [[0.0], [0.0, -0.0, 0.0], [0.5] * 2000, [-1.0, 0.25, 3.0] * 700, [1e-4, 1e4], range(16)])
def test_few_values_are_kept_as_they_are(values):
    values = np.array(values, np.float32)
    palette = kmeans_1d(values, 4)
    assert np.array_equal(palette.weight(), values.astype(np.float16)) and len(palette.values) == 16
    assert not np.signbit(palette.values[palette.values == 0]).any()


@pytest.mark.parametrize(("values", "bits", "message"), [([1.0, np.nan], 4, "finite"), ([1.0, -np.inf], 4, "finite"), ([1e5], 4, "16-bit"), ([], 4, "finite"), ([1.0], 0, "1 to 8 bits, not 0"), ([1.0], 9, "not 9")])
def test_what_no_palette_can_hold(values, bits, message):
    with pytest.raises(UserError, match=message):
        kmeans_1d(np.array(values), bits)


def test_far_from_zero_nothing_is_lost():
    """Sums of squares of such values have no digits left for an error; only fp16's steps of 0.5 may show."""
    values = 1000 + weights("uniform", 5_000)
    assert set(kmeans_1d(values, 4).values.tolist()) <= {999.0, 999.5, 1000.0, 1000.5, 1001.0}
