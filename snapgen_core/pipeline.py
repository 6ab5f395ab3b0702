"""SnapGenPipeline: from words to a picture, a diffusers pipeline like any other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from . import flow
from .decoder import TinyDecoder
from .errors import UserError
from .latents import decode, load_autoencoder, load_decoder
from .memory import keep_freed_memory
from .paths import checkpoint_dir
from .scales import PICTURE_DECODERS, PICTURE_STAGES, SAMPLING, get_scale
from .text import ENCODERS, TextEncoders, load_text_encoders
from .unet import SnapGenUNet
from .weights import load_model


@dataclass
class SnapGenPipelineOutput(BaseOutput):
    """`images`: list of PIL images, or a tensor [B, 3, H, W] in [-1, 1] with output_type="pt"."""

    images: list[Image.Image] | Tensor


class SnapGenPipeline(DiffusionPipeline):
    """Text encoders, student UNet and decoder (Sec. 4, "Model Details").

    Pictures are decoded by `decoder`, or where there is none by the autoencoder's own. The text encoders have SD3's component names; `clip_tokens` and `lm_tokens` are the lengths at which prompts are cut;
    `image_size` are the pixels that the student was trained for (SD3's autoencoder names its own); `steps` and `guidance` are
    what it draws with, unless told otherwise.
    """

    _optional_components = ["decoder"]

    def __init__(self, unet: SnapGenUNet, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, clip_tokens: int = 77, lm_tokens: int = 77, image_size: int = 1024, decoder: TinyDecoder | None = None, steps: int = 28, guidance: float = 4.0):
        super().__init__()
        self.register_modules(
            unet=unet, vae=vae, decoder=decoder, scheduler=scheduler,
            text_encoder=text_encoder, tokenizer=tokenizer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )
        self.register_to_config(clip_tokens=clip_tokens, lm_tokens=lm_tokens, image_size=image_size, steps=steps, guidance=guidance)
        self.text = TextEncoders(text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, clip_tokens, lm_tokens)

    @classmethod
    def from_pretrained(cls, folder, **settings) -> "SnapGenPipeline":
        """As diffusers', but from safetensors alone: the older formats can run code."""
        return super().from_pretrained(folder, **{"use_safetensors": True, **settings})

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of a run with `steps` steps, [steps + 1]."""
        return flow.inference_sigmas(steps, self.scheduler.config.shift)

    @property
    def painter(self) -> AutoencoderKL | TinyDecoder:
        """What turns latents into pixels: the tiny decoder where there is one, or else the autoencoder's own."""
        return self.vae if self.decoder is None else self.decoder

    def noise(self, count: int, generator: torch.Generator | list[torch.Generator] | None = None, size: int | None = None) -> Tensor:
        """Starting noise [count, C, size/8, size/8]. A list of generators gives every picture its own; with those of the
        CPU a seed means the same picture everywhere."""
        side = (size or self.config.image_size) // 8
        shape = (self.unet.config.in_channels, side, side)
        if isinstance(generator, list):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} pictures")
            return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generator]).to(self.device)
        device = generator.device if generator is not None else "cpu"
        return torch.randn(count, *shape, generator=generator, device=device).to(self.device)

    def velocity(self, context: Tensor, guidance_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The (guided) velocity field v(x, sigma) of a context [B, L, D]. Guidance 1 needs one network call a step,
        any other two, stacked in one batch; the unconditional context is zeros (Sec. 4)."""
        guided = guidance_scale != 1
        both = torch.cat([torch.zeros_like(context), context]) if guided else context
        both = both.to(self.unet.dtype)

        def field(x: Tensor, sigma: Tensor) -> Tensor:
            stacked = torch.cat([x, x]) if guided else x
            timestep = (flow.TIMESTEPS * sigma).to(x.device).expand(len(stacked))
            v = self.unet(stacked.to(self.unet.dtype), timestep, both).sample.to(x.dtype)
            return flow.guide(*v.chunk(2), guidance_scale) if guided else v

        return field

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        encoders: Iterable[str] = ENCODERS,
        size: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> SnapGenPipelineOutput:
        """Draw `prompt` (one, or a list of them: one picture each).

        Args:
            num_inference_steps: Euler steps (Eq. 3), at least 1 (default: the student's own, `config.steps`).
            guidance_scale: how strongly the prompt pulls; 1 is no guidance and half the work (default: `config.guidance`).
            generator: of the starting noise; a list has one for each prompt.
            encoders: the text encoders to use, any subset of "clip_l", "clip_g", "lm" (Sec. 4).
            size: pixels, a multiple of 8 (default: what the model was trained for).
            latents: starting noise in place of the generator's, [B, C, size/8, size/8].
            output_type: "pil", "pt" (tensor [B, 3, H, W] in [-1, 1]) or "latent".
            on_step: called after each step with (step, predicted clean latent).

        Raises:
            UserError: an empty prompt or settings that cannot work.
            ValueError: not one generator a prompt.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise UserError("the prompt is empty: say what to draw")
        num_inference_steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.config.guidance if guidance_scale is None else guidance_scale
        if num_inference_steps < 1:
            raise UserError(f"steps must be at least 1, not {num_inference_steps}")
        if output_type not in ("pil", "pt", "latent"):
            raise UserError(f"unknown output type {output_type!r}: choose pil, pt or latent")
        if size is not None and (size < 8 or size % 8):
            raise UserError(f"size must be a multiple of 8, not {size}")
        context = self.text.encode(prompts, use=encoders)
        noise = self.noise(len(prompts), generator, size) if latents is None else latents
        x = noise
        steps = flow.trajectory(self.velocity(context, guidance_scale), noise, self.sigmas(num_inference_steps))
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, x, x0 in steps:
                if on_step:
                    on_step(step, x0)
                bar.update()
        if output_type == "latent":
            return SnapGenPipelineOutput(images=x)
        images = decode(self.painter, x)
        return SnapGenPipelineOutput(images=to_pil(images) if output_type == "pil" else images)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] as PIL images."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).numpy()]


def build(scale: str, unet: SnapGenUNet, decoder: TinyDecoder | None = None, stage: str = "base") -> SnapGenPipeline:
    """A pipeline of the scale's autoencoder and text encoders around `unet`, and around a tiny `decoder` if there is one. It
    draws with as many steps as students of `stage` need, and guidance if they do.

    Raises:
        UserError: the student reads other text or latent channels than these give.
    """
    config = get_scale(scale)
    text, student = load_text_encoders(config), unet.config
    if (student.context_dim, student.in_channels, student.out_channels) != (config.context_dim, *2 * (config.latent_channels,)):
        raise UserError(
            f"the student reads {student.context_dim} text and {student.in_channels} latent channels; "
            f"the encoders of scale {scale} give {config.context_dim} and {config.latent_channels}"
        )
    pipe = SnapGenPipeline(
        unet.eval(), load_autoencoder(scale), FlowMatchEulerDiscreteScheduler(shift=config.shift),
        text.clip_l, text.tokenizers["clip_l"], text.clip_g, text.tokenizers["clip_g"], text.lm, text.tokenizers["lm"],
        config.clip_tokens, config.lm_tokens, config.image_size, decoder, *SAMPLING[stage],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(scale: str = "tiny", stage: str = "distilled", folder: Path | None = None, decoder: str = "full") -> SnapGenPipeline:
    """The pipeline with the weights that ship (`data/checkpoints/<scale>/<stage>`), or with the UNet in `folder`, and with
    the autoencoder's own decoder ("full") or the one that `snapgen train decoder --ship` made ("tiny").

    Raises:
        UserError: unknown names, or weights that are missing, truncated or of another model.
    """
    get_scale(scale)
    keep_freed_memory()
    if stage not in PICTURE_STAGES:
        raise UserError(f"unknown stage {stage!r}: choose one of {', '.join(PICTURE_STAGES)}")
    if decoder not in PICTURE_DECODERS:
        raise UserError(f"unknown decoder {decoder!r}: choose {' or '.join(PICTURE_DECODERS)}")
    tiny = load_decoder(checkpoint_dir(scale) / "decoder") if decoder == "tiny" else None
    return build(scale, load_unet(folder or checkpoint_dir(scale) / stage), tiny, stage)


def load_unet(folder: Path) -> SnapGenUNet:
    """A student saved with `save_pretrained`, in fp32. Raises UserError where there is none, or no sound one."""
    if not (Path(folder) / "config.json").is_file():
        stage = Path(folder).name if Path(folder).name in PICTURE_STAGES else "base"
        raise UserError(f"no student in {folder}: train one with `snapgen train {stage}` at its scale, and --ship it or name its folder RUN_DIR/weights/{stage}")
    return load_model(SnapGenUNet, folder, f"the student in {folder}")
