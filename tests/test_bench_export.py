"""`snapgen bench export` on networks small enough for a test: every figure, and the same numbers out of the packed package."""

import json

import pytest
import torch

from snapgen_core import bench_export
from snapgen_core.cli import main
from snapgen_core.errors import UserError
from snapgen_core.export.parts import DenoiserPart, Part
from snapgen_core.export.phone import PhoneUNet
from snapgen_core.unet import SnapGenUNet

pytest.importorskip("coremltools")


def small_part():
    torch.manual_seed(0)
    unet = bench_export.awake(SnapGenUNet(channels=(32, 64), context_dim=24, transformer_depth=(1, 1), layers_per_block=1, head_dim=16, time_embed_dim=32, self_attention=(False, True), residual_blocks=(True, True), in_channels=4, out_channels=4))
    inputs = {
        "latent_image_embeddings": bench_export.noise(2, 4, 8, 8),
        "timestep": torch.full((2,), 857.14),
        "token_level_text_embeddings": bench_export.noise(2, 32, 1, 6),
        "pooled_text_embeddings": bench_export.noise(2, 8, 1, 1),
    }
    return Part("MultiModalDiffusionTransformer", DenoiserPart(PhoneUNet(unet, 8), 24, guided=False).eval(), inputs, ("velocity",))


def test_every_step_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_export.PARTS, "unet", small_part)
    found = bench_export.measure("unet", tmp_path)
    assert list(found["seconds"]) == ["torch", "convert", "replay fp32", "replay fp16", "sensitivities", "palettes", "convert and pack", "replay packed"]
    assert found["fp32_db"] > 60 and found["fp16_db"] > 40
    assert 4 <= found["bits"] <= bench_export.BITS and found["packed_megabytes"] < 0.8 * found["megabytes"]
    assert found["packed_db"] > 40 > found["palettized_db"]  # the package holds the palettes, and palettes cost something
    assert found["parameters"] == sum(p.numel() for p in small_part().module.parameters())


def test_the_papers_parts_have_the_contracts_shapes():
    """Shapes alone, and the sizes that the paper prints."""
    with torch.device("meta"):
        assert sum(p.numel() for p in SnapGenUNet.from_preset("paper").parameters()) == pytest.approx(379e6, rel=0.01)
    decoder = bench_export.decoder_part()
    assert {name: tuple(x.shape) for name, x in decoder.inputs.items()} == {"z": (1, 16, 128, 128)}


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capfd):
    found = {"parameters": 379_000_000, "memory_gib": 9.1, "peak_memory_gib": 11.2, "megabytes": 760.0, "fp32_db": 88.8, "fp16_db": 66.6, "bits": 4.29, "packed_megabytes": 210.5, "packed_db": 77.7, "palettized_db": 20.0, "seconds": {"convert": 321.0}}
    monkeypatch.setattr(bench_export, "run", lambda name: found)
    assert main(["bench", "export", "--only", "unet", "--json", str(tmp_path / "b.json")]) == 0
    out = capfd.readouterr().out
    assert "convert 321 s" in out and "66.6 dB in fp16" in out and "210.5 MB" in out and "11.2 GiB" in out
    assert json.loads((tmp_path / "b.json").read_text())["networks"] == {"unet": found}
    assert main(["bench", "export", "--only", "vae"]) == 2 and "choose among unet, decoder" in capfd.readouterr().err


def test_a_process_that_fails_tells_why():
    with pytest.raises(UserError, match="nothing: .*KeyError: 'nothing'"):
        bench_export.run("nothing")
