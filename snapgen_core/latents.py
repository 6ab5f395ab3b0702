"""Images to latents and back, through a frozen autoencoder."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .decoder import TinyDecoder
from .errors import UserError
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
    """The tiny decoder in `folder`, frozen, fp32. Raises UserError where there is none, or no sound one."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no tiny decoder in {folder}: train one with `snapgen train decoder` at its scale, and --ship it")
    return load_model(TinyDecoder, folder, f"the decoder {folder.name}").requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [B,3,H,W] in [-1, 1] to normalised latents [B,16,H/8,W/8]: z_in = (z - shift) * scale."""
    z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(decoder: AutoencoderKL | TinyDecoder, latents: Tensor) -> Tensor:
    """Normalised latents [B,16,h,w] to images [B,3,8h,8w] in [-1, 1], by an autoencoder's own decoder or by a tiny one."""
    z = latents.to(decoder.device, decoder.dtype)
    if isinstance(decoder, AutoencoderKL):  # the tiny one reads them as they are
        z = z / decoder.config.scaling_factor + decoder.config.shift_factor
        return decoder.decode(z).sample.clamp(-1, 1)
    return decoder(z).sample.clamp(-1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, decoder: TinyDecoder | None = None, batch: int = 32) -> Tensor:
    """Images [N,3,H,W] to latents and back, through `decoder` or else through the autoencoder's own; in [-1, 1]."""
    return torch.cat([decode(vae if decoder is None else decoder, encode(vae, part)).cpu() for part in images.split(batch)])


def latents_digest(vae: AutoencoderKL) -> str:
    """Hex digest of all that decides `encode`'s result, and of nothing else: another decoder reads the same latents."""
    return hashlib.sha256(f"{weights_digest(vae.encoder)} {vae.config.shift_factor} {vae.config.scaling_factor}".encode()).hexdigest()
