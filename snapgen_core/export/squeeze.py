"""The student in fewer bits: which layers can bear it is measured on the student's own runs, and so is it tuned afterwards.

SnapGen++ (Supplement C) calls the last step self-distillation. No data are needed: the inputs that matter are those that the
student meets while it draws, so it draws some prompts, and what passes by is kept.
"""

import copy

import torch
from torch import Tensor

from ..errors import UserError
from ..pipeline import SnapGenPipeline
from ..scenes import draw_prompt
from .palettize import PACKAGE_BITS, Palettes, average_bits, palettizable, palettize, plan, sensitivities, size_in_bytes, tune
from .phone import PhoneUNet
from .replay import psnr_db

PROMPTS, STEPS, BATCH = 32, 8, 32  # drawn for calibration, in so many steps; samples of a batch
TUNE_STEPS = 60
LOWEST = 4  # bits, in which most layers are stored

Batch = tuple[Tensor, Tensor, Tensor]  # sample [B,C,h,w], timestep [B], context [B,D,1,L]


@torch.no_grad()
def calibration(pipe: SnapGenPipeline, guided: bool, seed: int = 0) -> list[Batch]:
    """Inputs of the student while it draws PROMPTS pictures, prompt and, with `guided`, unconditional; in shuffled batches."""
    prompts = [draw_prompt(seed, i, "seen").text for i in range(PROMPTS)]
    kept: list[Batch] = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, given: kept.append(given))
    try:
        pipe(prompts, num_inference_steps=STEPS, guidance_scale=4.0 if guided else 1.0, generator=torch.Generator().manual_seed(seed), output_type="latent")
    finally:
        hook.remove()
    samples, timesteps, context = (torch.cat(parts) for parts in zip(*kept))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).to(samples.device)
    return list(zip(*(part[order].split(BATCH) for part in (samples, timesteps, context.transpose(1, 2)[:, :, None]))))


def squeeze(phone: PhoneUNet, batches: list[Batch], bits: float, tune_steps: int = TUNE_STEPS, progress: bool = True) -> tuple[Palettes, dict]:
    """Palettise `phone` in place to `bits` on average and tune what is left in 16 bits. Returns palettes and figures.

    Raises:
        UserError: fewer than LOWEST bits are asked for, or more than 8.
    """
    if not LOWEST <= bits <= 8:
        raise UserError(f"palettes take {LOWEST} to 8 bits on average, not {bits:g}")
    reference = copy.deepcopy(phone)
    sizes = {name: layer.weight.numel() for name, layer in palettizable(phone).items()}
    low = max(width for width in PACKAGE_BITS if LOWEST <= width <= bits)
    chosen = plan(sensitivities(phone, batches, low), sizes, bits, low=low)
    palettes = palettize(phone, chosen)
    errors = tune(phone, reference, batches, tune_steps, progress=progress) if tune_steps else []
    with torch.no_grad():
        quality = min(psnr_db(reference(*batch), phone(*batch)) for batch in batches[:4])
    figures = {"bits": average_bits(chosen, sizes), "bytes": size_in_bytes(phone, chosen), "layers_at_8_bits": sum(width == 8 for width in chosen.values()), "layers": len(chosen), "psnr_db": quality}
    return palettes, figures | ({"error_before_tuning": errors[0], "error_after": sum(errors[-20:]) / len(errors[-20:])} if errors else {})


def squeeze_pipeline(pipe: SnapGenPipeline, bits: float, guided: bool, tune_steps: int = TUNE_STEPS) -> dict:
    """Give the pipeline's student squeezed weights, and return figures; 16 bits means weights rounded, and no palettes."""
    phone = PhoneUNet(pipe.unet, pipe.config.image_size // 8).to(pipe.unet.device)
    if bits == 16:
        phone.half().float()
        figures = {"bits": 16.0, "bytes": 2 * sum(p.numel() for p in phone.parameters())}
    else:
        _, figures = squeeze(phone, calibration(pipe, guided), bits, tune_steps)
    phone.write_back(pipe.unet)
    return figures
