"""Core AI assets, run by Apple's own runtime, against torch."""

import sys

import pytest
import torch

from snapgen_core import load
from snapgen_core.errors import UserError
from snapgen_core.export import coreai, verify
from snapgen_core.export.parts import Part, parts
from snapgen_core.export.replay import psnr_db

needs_apple = pytest.mark.usefixtures("apple")


@pytest.fixture
def apple():
    pytest.importorskip("coreai_torch", reason="the extra coreai is not installed")


@needs_apple
@pytest.mark.parametrize("name", ["TextEncoder3", "VAEDecoder"])
def test_apples_runtime_computes_what_torch_does(name, tmp_path):
    pipe = load("tiny", "base", decoder="tiny")
    part = next(part for part in parts(pipe, guided=True) if part.name == name)
    path, inputs = coreai.save(part, tmp_path / f"{name}.aimodel"), verify.realistic(part, pipe, "a red car")
    found = coreai.run(path, **inputs)
    assert list(found) == list(part.outputs)
    assert psnr_db(part.module(**inputs), found[part.outputs[0]]) >= 60
    other = coreai.run(path, **{name: 2 * value for name, value in inputs.items()})
    assert psnr_db(part.module(**inputs), other[part.outputs[0]]) < 60


class Odd(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@needs_apple
def test_what_it_cannot_hold_is_named(tmp_path):
    with pytest.raises(UserError, match="Core AI cannot hold Odd: "):
        coreai.save(Part("Odd", Odd(), {"x": torch.rand(1, 4)}, ("y",)), tmp_path / "odd.aimodel")
    with pytest.raises(UserError, match="ends in .aimodel"):
        coreai.save(Part("Odd", Odd(), {"x": torch.rand(1, 4)}, ("y",)), tmp_path / "odd.zip")
    with pytest.raises(UserError, match="no such asset"):
        coreai.run(tmp_path / "gone.aimodel")


def test_without_apples_packages_the_way_to_them_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coreai_torch", None)
    with pytest.raises(UserError, match=r"pip install \"snapgen_core\[coreai\]\""):
        coreai.save(None, tmp_path / "a.aimodel")
