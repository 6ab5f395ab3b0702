"""Does a bundle compute what its pipeline computes? Every package is run by `Replay` and held against the torch module."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import flow
from ..errors import UserError
from ..pipeline import SnapGenPipeline
from . import coreai, macos
from .coreml import read_manifest
from .parts import DenoiserPart, Part
from .replay import Replay, psnr_db

FP32_BAR, FP16_BAR, PICTURE_BAR = 50.0, 35.0, 35.0  # dB: below, `snapgen export --verify` fails
PROMPTS = ("a red car", "a dog left of a cat")


@dataclass(frozen=True)
class Parity:
    """One output of a part: PSNR in dB of the replayed package against torch, computed in fp32 and as the package says; and of
    the Core AI asset beside it, where there is one, run by Apple's runtime."""

    part: str
    output: str
    fp32_db: float
    fp16_db: float
    core_ai_db: float | None = None


class Bundle:
    """A bundle's packages, replayed, in the roles of an app that follows the manifest: words in, picture out."""

    def __init__(self, folder: Path, pipe: SnapGenPipeline, precision: str = "fp16"):
        self.manifest, self.pipe = read_manifest(folder), pipe
        self.packages = {name: Replay(folder / entry["file"], precision) for name, entry in self.manifest["parts"].items()}

    def context(self, prompt: str) -> Tensor:
        """The prompt's embeddings as the app lays them out, [1, W, 1, L]."""
        width = self.packages["MultiModalDiffusionTransformer"].inputs["token_level_text_embeddings"].shape[1]
        ids = token_ids(self.pipe, prompt)
        clips = [self.packages[name](input_ids=ids[name])["hidden_embeds"] for name in ("TextEncoder", "TextEncoder2")]
        language = self.packages["TextEncoder3"](input_ids=ids["TextEncoder3"])["encoder_hidden_states"]
        filled = [torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in (torch.cat(clips, dim=2), language)]
        return torch.cat(filled, dim=1).transpose(1, 2)[:, :, None]

    def draw(self, prompt: str, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """A picture [1, 3, H, W] in [-1, 1] from noise [1, C, h, w], at the manifest's noise levels; unconditional is a context of zeros."""
        context = self.context(prompt)
        both, denoiser = torch.cat([context, torch.zeros_like(context)]), self.packages["MultiModalDiffusionTransformer"]
        pooled = torch.zeros(denoiser.inputs["pooled_text_embeddings"].shape)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            answer = denoiser(latent_image_embeddings=torch.cat([x, x]), timestep=(flow.TIMESTEPS * sigma).expand(2), token_level_text_embeddings=both, pooled_text_embeddings=pooled)
            prompts, negative = answer["velocity"].chunk(2)
            return flow.guide(negative, prompts, guidance)

        latent = flow.sample(velocity, noise, self.pipe.sigmas(steps))
        scale, shift = (self.manifest["latents"][name] for name in ("scale", "shift"))
        return self.packages["VAEDecoder"](z=latent / scale + shift)["image"]


def token_ids(pipe: SnapGenPipeline, prompt: str) -> dict[str, Tensor]:
    """Token numbers for each text encoder's package, filled up to its length, as floats [1, T]."""
    numbers = {}
    for package, name in (("TextEncoder", "clip_l"), ("TextEncoder2", "clip_g"), ("TextEncoder3", "lm")):
        length = pipe.text.shape.clip_tokens if name != "lm" else pipe.text.shape.lm_tokens
        tokens = pipe.text.tokenizers[name]([prompt], padding="max_length", max_length=length, truncation=True, padding_side="right", return_tensors="pt")
        numbers[package] = tokens["input_ids"].float()
    return numbers


def realistic(part: Part, pipe: SnapGenPipeline, prompt: str, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a part as they come in a run: a prompt's tokens, its embeddings, a noisy latent at a level between."""
    generator = torch.Generator().manual_seed(seed)
    if "input_ids" in part.inputs:
        return {"input_ids": token_ids(pipe, prompt)[part.name]}
    inputs = {name: torch.randn(example.shape, generator=generator) for name, example in part.inputs.items()}
    if "timestep" in inputs:
        inputs["timestep"] = torch.full((2,), 857.14)
        context = pipe.text.encode([prompt]).transpose(1, 2)[:, :, None].cpu()
        inputs["token_level_text_embeddings"] = torch.zeros(part.inputs["token_level_text_embeddings"].shape)
        inputs["token_level_text_embeddings"][:1, : context.shape[1]] = context
    return inputs


@torch.no_grad()
def parity(folder: Path, pipe: SnapGenPipeline, made: Sequence[Part], prompts: Iterable[str] = PROMPTS) -> list[Parity]:
    """Every output of every part, the worst of `prompts`; `made` are the parts that `export` converted."""
    manifest, rows = read_manifest(folder), []
    for part in made:
        packages = {precision: Replay(folder / manifest["parts"][part.name]["file"], precision) for precision in ("fp32", "fp16")}
        asset = folder / f"{part.name}.aimodel"
        if asset.exists():
            packages["core_ai"] = partial(coreai.run, asset)
        worst = {name: {} for name in part.outputs}
        for prompt in prompts:
            inputs = realistic(part, pipe, prompt)
            expected = part.answers(inputs)
            for precision, package in packages.items():
                replayed = package(**inputs)
                for name, value in expected.items():
                    found = psnr_db(value, replayed[name])
                    worst[name][precision] = min(found, worst[name].get(precision, found))
        rows += [Parity(part.name, name, figures["fp32"], figures["fp16"], figures.get("core_ai")) for name, figures in worst.items()]
    return rows


@torch.no_grad()
def on_this_mac(folder: Path, pipe: SnapGenPipeline, made: Sequence[Part]) -> dict[str, dict]:
    """Core ML's own answers, places and times for each part (`macos.measure`)."""
    found = {}
    for part in made:
        inputs = realistic(part, pipe, PROMPTS[0])
        found[part.name] = macos.measure(folder / f"{part.name}.mlpackage", inputs, part.answers(inputs))
    return found


def pictures(folder: Path, pipe: SnapGenPipeline, prompt: str, steps: int, guidance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same prompt and noise drawn by torch and by the replayed bundle, [1, 3, H, W] each."""
    noise = pipe.noise(1, [torch.Generator().manual_seed(seed)]).cpu()
    ours = pipe(prompt, latents=noise.to(pipe.device), num_inference_steps=steps, guidance_scale=guidance, output_type="pt").images.cpu()
    return ours, Bundle(folder, pipe).draw(prompt, noise, steps, guidance)


def verify(folder: Path, pipe: SnapGenPipeline, made: Sequence[Part], steps: int = 4) -> dict:
    """All figures as a dict for the manifest: "parts", and "picture", PSNR of a picture drawn in `steps`.

    A squeezed student's pictures are held against its own, drawn by torch with the same palettes.

    Raises:
        UserError: a part is below FP32_BAR (then the translation is wrong) or FP16_BAR, or the picture below PICTURE_BAR.
    """
    guidance = 4.0 if read_manifest(folder)["guided"] else 1.0
    next(part.module.unet for part in made if isinstance(part.module, DenoiserPart)).write_back(pipe.unet)
    rows = parity(folder, pipe, made)
    figures = {"parts": [asdict(row) for row in rows], "picture": {"prompt": PROMPTS[0], "steps": steps, "guidance": guidance, "fp16_db": psnr_db(*pictures(folder, pipe, PROMPTS[0], steps, guidance))}}
    if low := [f"{row.part}.{row.output} {row.fp32_db:.1f} dB in fp32, {row.fp16_db:.1f} in fp16" for row in rows if row.fp32_db < FP32_BAR or row.fp16_db < FP16_BAR]:
        raise UserError(f"the bundle does not compute what the pipeline does: {', '.join(low)}, where {FP32_BAR:g} and {FP16_BAR:g} are asked")
    if figures["picture"]["fp16_db"] < PICTURE_BAR:
        raise UserError(f"pictures of the bundle differ from the pipeline's: {figures['picture']['fp16_db']:.1f} dB, where {PICTURE_BAR:g} are asked")
    return figures
