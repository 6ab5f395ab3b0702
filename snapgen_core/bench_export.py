"""What it takes to bring the paper's networks to a phone: conversion, replay and palettes at full size, with random weights.

Each network in a process of its own, so that its peak memory is its own. Random weights are no shortcut here: conversion,
k-means and packing do the same work whatever the numbers are.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from .decoder import TinyDecoder
from .errors import UserError
from .export.coreml import convert
from .export.lint import report
from .export.palettize import average_bits, palettizable, palettize, plan, sensitivities, to_mlpackage
from .export.parts import APP_WIDTH, DecoderPart, DenoiserPart, Part
from .export.phone import PhoneGroupNorm, PhoneUNet, replace_modules
from .export.replay import Replay, psnr_db
from .memory import keep_freed_memory
from .profile import count_parameters, peak_memory
from .unet import SnapGenUNet

SIDE = 128  # latent pixels: a picture of 1024
TOKENS, POOLED = 154, 2048
BITS = 4.3


def unet_part() -> Part:
    """The paper's student, which draws without guidance: the prompt's half of the batch is computed alone."""
    torch.manual_seed(0)
    unet = awake(SnapGenUNet.from_preset("paper"))
    inputs = {
        "latent_image_embeddings": noise(2, 16, SIDE, SIDE),
        "timestep": torch.full((2,), 857.14),
        "token_level_text_embeddings": noise(2, APP_WIDTH, 1, TOKENS),
        "pooled_text_embeddings": noise(2, POOLED, 1, 1),
    }
    return Part("MultiModalDiffusionTransformer", DenoiserPart(PhoneUNet(unet, SIDE), unet.config.context_dim, guided=False).eval(), inputs, ("velocity",))


def decoder_part() -> Part:
    """The paper's decoder, between SD3's scale and shift."""
    torch.manual_seed(0)
    decoder = TinyDecoder.from_preset("paper").eval()
    replace_modules(decoder, nn.GroupNorm, PhoneGroupNorm)
    return Part("VAEDecoder", DecoderPart(decoder, 1.5305, 0.0609).requires_grad_(False).eval(), {"z": noise(1, 16, SIDE, SIDE)}, ("image",))


PARTS = {"unet": unet_part, "decoder": decoder_part}


def awake(network: nn.Module) -> nn.Module:
    """With small numbers where a new network has zeros: a branch that answers zero would hide its errors."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def measure(name: str, folder: Path) -> dict:
    """Seconds, GiB and dB of one network's way to a phone."""
    keep_freed_memory()
    part, seconds, path = PARTS[name](), {}, folder / "made.mlpackage"
    started = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal started
        seconds[what] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    figures = {"parameters": count_parameters(part.module)}
    expected = part.module(**part.inputs)
    lap("torch")
    convert(part).save(str(path))
    lap("convert")
    figures["memory_gib"] = peak_memory()
    figures |= {"megabytes": size(path), "lint": report(path)}
    for precision in ("fp32", "fp16"):
        figures[f"{precision}_db"] = psnr_db(expected, Replay(path, precision)(**part.inputs)[part.outputs[0]])
        lap(f"replay {precision}")
    if name == "unet":  # the best public exporters leave the decoder in 16 bits, too: it is small
        figures |= squeeze(part, path, expected, lap)
    return figures | {"seconds": seconds, "peak_memory_gib": peak_memory()}


def squeeze(part: Part, path: Path, expected: Tensor, lap) -> dict:
    """Palettes to BITS on average, in the package's own format."""
    network = part.module.unet
    batch = (part.inputs["latent_image_embeddings"][:1], part.inputs["timestep"][:1], part.inputs["token_level_text_embeddings"][:1, : part.module.context_dim])
    found = sensitivities(network, [batch])
    lap("sensitivities")
    layers = palettizable(network)
    sizes = {layer: module.weight.numel() for layer, module in layers.items()}
    bits = plan(found, sizes, BITS)
    palettes = palettize(network, bits)
    lap("palettes")
    packed = to_mlpackage(convert(part), palettes)
    packed.save(str(path.with_name("packed.mlpackage")))
    lap("convert and pack")
    replayed = Replay(path.with_name("packed.mlpackage"), "fp32")(**part.inputs)[part.outputs[0]]
    lap("replay packed")
    return {"bits": average_bits(bits, sizes), "packed_megabytes": size(path.with_name("packed.mlpackage")), "packed_db": psnr_db(part.module(**part.inputs), replayed), "palettized_db": psnr_db(expected, replayed)}


def size(package: Path) -> float:
    """Megabytes of a folder."""
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) / 1e6


def run(name: str) -> dict:
    """`measure` in a new process. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run([sys.executable, "-m", __name__, name, folder], capture_output=True, text=True)
    if child.returncode:
        raise UserError(f"{name}: {(child.stderr.strip().splitlines() or ['ended by the system, probably for want of memory'])[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
