"""Images to latents and back, through a frozen autoencoder."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .decoder import TinyDecoder
from .paths import checkpoint_dir
from .scales import get_scale
from .weights import load_model, weights_digest


def load_autoencoder(scale: str, folder: Path | None = None) -> AutoencoderKL:
    """The scale's autoencoder, frozen, fp32: the one trained here (`tiny`), SD3's from the hub, or the one in `folder`.
    Raises UserError as `load_model`."""
    hub = get_scale(scale).hub
    place, subfolder = (hub, "vae") if folder is None and hub else (folder or checkpoint_dir(scale) / "autoencoder", "")
    return load_model(AutoencoderKL, place, f"the autoencoder of scale {scale}", subfolder=subfolder).requires_grad_(False)


def load_decoder(folder: Path) -> TinyDecoder:
    """The tiny decoder in `folder`, frozen, fp32. Raises UserError as `load_model`."""
    return load_model(TinyDecoder, folder, f"the decoder {folder.name}").requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [B,3,H,W] in [-1, 1] to normalised latents [B,16,H/8,W/8]: z_in = (z - shift) * scale."""
    z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents [B,16,h,w] to images [B,3,8h,8w] in [-1, 1]."""
    z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z).sample.clamp(-1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, decoder: TinyDecoder | None = None, batch: int = 32) -> Tensor:
    """Images [N,3,H,W] to latents and back, through `decoder` or else through the autoencoder's own; in [-1, 1]."""
    parts = []
    for part in images.split(batch):
        latents = encode(vae, part)
        back = decode(vae, latents) if decoder is None else decoder(latents.to(decoder.device)).sample.clamp(-1, 1)
        parts.append(back.cpu())
    return torch.cat(parts)


def latents_digest(vae: AutoencoderKL) -> str:
    """Hex digest of all that decides `encode`'s result, and of nothing else: another decoder reads the same latents."""
    return hashlib.sha256(f"{weights_digest(vae.encoder)} {vae.config.shift_factor} {vae.config.scaling_factor}".encode()).hexdigest()
