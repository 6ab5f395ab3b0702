"""EfficientNet-Lite0 knows what is on the shipped photos, and its distance behaves as one."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from snapgen_core.data import to_tensor
from snapgen_core.paths import data_dir
from snapgen_core.perceptual import _FEATURES, EfficientNetLite0, Lite0Distance, _pretrained, perceptual_distance
from snapgen_core.profile import count_parameters


def photo(name: str, size: int = 224) -> torch.Tensor:
    return to_tensor(Image.open(data_dir() / "photos" / f"{name}.webp").resize((size, size), Image.Resampling.LANCZOS))[None]


@pytest.mark.parametrize(("name", "number"), [("flower", 985), ("picosdeeuropa_by_Aitzol_Berasategi", 970), ("greentock_by_Peter_Nerlich", 892), ("cvo9xd_keong_macan_srgb8", 972)])
def test_the_network_knows_what_it_sees(name, number):
    """ImageNet's classes 985 daisy, 970 alp, 892 wall clock and 972 cliff."""
    with torch.no_grad():
        probabilities = _pretrained()(photo(name))[0].softmax(0)
    assert probabilities.argmax() == number and probabilities[number] > 0.6


def test_size_is_the_published_one():
    assert count_parameters(EfficientNetLite0()) == pytest.approx(4.7e6, rel=0.02)


def test_distance_by_hand():
    distance, a, b = Lite0Distance(), photo("flower", 64), photo("free_by_Peter_Nerlich", 64)
    network, total = _pretrained(), 0.0
    for i in _FEATURES:
        p, q = (network.all_features(x)[i][0] for x in (a, b))
        height, width = p.shape[1:]
        for y in range(height):
            for x in range(width):
                u, v = p[:, y, x], q[:, y, x]
                total += float((u / u.norm() - v / v.norm()).pow(2).sum()) / (height * width)
    assert distance(a, b).item() == pytest.approx(total, rel=1e-4)


def test_distance_grows_with_damage_and_is_zero_without():
    distance, a = Lite0Distance(), photo("flower", 64)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    values = [distance(a, a + level * noise).item() for level in (0.0, 0.05, 0.2)]
    assert values[0] == 0 and values == sorted(set(values))


def test_its_gradient_reaches_the_picture_and_its_weights_are_nobodys():
    distance, a = Lite0Distance(), photo("flower", 64)
    made = (a * 0.9).requires_grad_()
    distance(made, a).sum().backward()
    assert made.grad.abs().sum() > 0
    assert not distance.state_dict() and not list(distance.parameters())


def test_lpips_is_called_as_its_authors_say(monkeypatch):
    """Pictures in [-1, 1], VGG's features, and nothing of it is trained or saved with a decoder."""
    asked = []

    class Lpips(torch.nn.Conv2d):
        def __init__(self, net, verbose):
            super().__init__(3, 1, 1)
            asked.append(net)

        def forward(self, a, b):
            return ((a - b) ** 2).mean(dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1], as the package

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Lpips))
    distance, a = perceptual_distance("lpips"), torch.ones(2, 3, 8, 8)
    assert asked == ["vgg"] and distance.state_dict() == {} and list(distance.parameters()) == []
    assert torch.equal(distance(a, torch.stack([-a[0], a[0]])), torch.tensor([4.0, 0.0]))
