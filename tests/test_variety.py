"""Diversity and kernel distance against sums written out, and on pictures whose order is known."""

import itertools

import pytest
import torch

from snapgen_core.evaluate.variety import diversity, kernel_distance, measure
from snapgen_core.perceptual import Lite0Distance, _pretrained, lite0_features
from snapgen_core.scenes import draw_scene


def test_kernel_distance_by_hand():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / 3 + 1) ** 3

    among_a = [kernel(x, y) for x, y in itertools.permutations(a, 2)]
    among_b = [kernel(x, y) for x, y in itertools.permutations(b, 2)]
    between = [kernel(x, y) for x in a for y in b]
    expected = sum(among_a) / len(among_a) + sum(among_b) / len(among_b) - 2 * sum(between) / len(between)
    assert kernel_distance(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_around_zero_for_one_distribution_and_grows_with_the_shift():
    generator = torch.Generator().manual_seed(0)
    same = torch.stack([kernel_distance(torch.randn(60, 8, generator=generator), torch.randn(60, 8, generator=generator)) for _ in range(40)])
    assert same.mean().abs() < 3 * same.std() / 40**0.5 and (same < 0).any()
    a, b = torch.randn(200, 8, generator=generator), torch.randn(200, 8, generator=generator)
    distances = [kernel_distance(a, b + shift).item() for shift in (0.0, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[1] > 10 * abs(distances[0])


def test_diversity_is_the_mean_over_pairs():
    pictures = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[1, 1:] = pictures[1, :1]  # the second prompt's are all the same
    distance = Lite0Distance()
    pairs = [distance(pictures[0, i : i + 1], pictures[0, j : j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert diversity(pictures).tolist() == pytest.approx([sum(pairs) / 3, 0.0], rel=1e-4)


def test_features_are_what_the_classes_are_read_from():
    network = _pretrained()
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(network.classes(lite0_features(pictures, size=2)), network(pictures), atol=1e-4)


def test_grey_pictures_are_neither_varied_nor_like_scenes():
    asked = []

    def grey(captions, seeds):
        asked.extend(zip(captions, seeds))
        return torch.zeros(len(captions), 3, 64, 64)

    def scenes(captions, seeds):
        return torch.stack([draw_scene(seed % 1000, 0, "seen", "colors").image for seed in seeds])

    flat, true = (measure(generate, 64, per_task=4, prompts=3, progress=False) for generate in (grey, scenes))
    assert flat["diversity"] == 0 and true["diversity"] > 0.1
    assert flat["kernel_distance"] > true["kernel_distance"] and flat["kernel_distance_of_truth"] == true["kernel_distance_of_truth"]
    assert len(asked) == 6 * 4 + 3 * 4 and len(set(asked)) == len(asked)  # every picture has noise of its own
    assert {caption for caption, _ in asked[24:]} <= {caption for caption, _ in asked[:24]}
