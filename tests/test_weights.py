"""Digests name what decides a cache, and shipping leaves the model as it was."""

import json

import torch
from torch import nn

from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
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


def test_what_ships_names_no_path_of_this_machine(tmp_path):
    loaded = load_unet(checkpoint_dir("tiny") / "base")
    assert str(checkpoint_dir("tiny")) in str(loaded.config._name_or_path)  # diffusers notes it
    save_half(loaded, tmp_path / "made")
    assert "_name_or_path" not in json.loads((tmp_path / "made" / "config.json").read_text())
    assert load_unet(tmp_path / "made").config.channels == loaded.config.channels
    for config in checkpoint_dir("tiny").glob("*/config.json"):
        assert not json.loads(config.read_text()).get("_name_or_path", "").startswith("/"), config
