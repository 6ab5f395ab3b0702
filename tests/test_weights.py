"""Digests name what decides a cache, and shipping leaves the model as it was."""

import torch
from torch import nn

from snapgen_core.unet import SnapGenUNet
from snapgen_core.weights import save_half, weights_digest
from test_train import LatentStage


def test_digest_sees_values_names_types_and_shapes_alone():
    layer = nn.Linear(4, 4)
    first = weights_digest(layer)
    assert weights_digest(layer.train()) == first
    others = [nn.Linear(4, 4), nn.Sequential(layer), layer.half()]
    assert len({first, *map(weights_digest, others)}) == 4
    image = nn.Conv2d(3, 4, 3)
    assert weights_digest(image) == weights_digest(image.to(memory_format=torch.channels_last))  # a layout is no other weight


def test_shipped_in_half_precision_the_model_stays_as_it_was(tmp_path):
    unet = LatentStage().module.unet.to(memory_format=torch.channels_last)
    before = weights_digest(unet)
    save_half(unet, tmp_path)
    assert weights_digest(unet) == before
    shipped = SnapGenUNet.from_pretrained(tmp_path, torch_dtype=torch.float16)
    for name, tensor in shipped.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, unet.state_dict()[name].half())
