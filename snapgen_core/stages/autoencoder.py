"""Stage `autoencoder`: SD3's AutoencoderKL made narrow, trained on emoji scenes (f = 8, 16 channels, Sec. 3.2)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..errors import UserError
from ..evaluate.fidelity import psnr
from ..latents import load_autoencoder, reconstruct
from ..scales import get_scale
from ..scenes import TRAIN_MIX, Prompt, Wanted, draw_images, draw_scene, plain_names, render
from ..train import TrainSettings, step_generator
from ..weights import save_half

# Single emoji of all kinds teach the autoencoder more shapes than the 32 classes of the scenes.
MIX = {**TRAIN_MIX, "plain": 0.3}
MAX_LEVEL = 0.5  # the strongest noise on latents, in units of their standard deviation


class AutoencoderTraining(nn.Module):
    """forward(image [B,3,S,S], noise [B,16,S/8,S/8], level [B]) -> (L1 + 4 MSE + 1e-4 KL, figures).

    L1 keeps edges sharp, MSE is what PSNR measures. The KL term alone leaves a posterior far narrower than the
    latent's spread, and a decoder that takes every latent literally. A small student errs by more, so the decoder
    learns to read latents with noise of `level` times their standard deviation.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.vae.encode(image).latent_dist
        spread = posterior.mean.detach().std()
        decoded = self.vae.decode(posterior.mean + (posterior.std + spread * level[:, None, None, None]) * noise).sample
        l1 = (decoded - image).abs().mean()
        mse = (decoded - image).square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return l1 + 4 * mse + 1e-4 * kl, {"l1": l1.detach(), "mse": mse.detach(), "kl": kl.detach()}


class AutoencoderStage:
    """See `snapgen_core.train.Stage`."""

    name = "autoencoder"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        self.scale, self.seed = scale, seed
        config = get_scale(scale)
        if config.autoencoder is None:
            raise UserError(f"scale {scale} uses SD3's autoencoder from the hub: there is nothing to train")
        self.size = config.image_size
        self.draw = self.drawing()
        torch.manual_seed(seed)
        self.module = AutoencoderTraining(AutoencoderKL(**config.autoencoder)).to(memory_format=torch.channels_last)
        self.encoder_frozen = False
        self.settings = TrainSettings(batch_size=16, learning_rate=1.2e-3, betas=(0.9, 0.99), steps=6000)

    def drawing(self) -> Callable[[range], Tensor]:
        """indices -> training pictures [N,3,S,S]."""
        return lambda indices: draw_images(self.seed, indices, size=self.size, mix=MIX)

    def prepare(self) -> None:
        pass  # pictures are drawn as they are needed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        first = step * self.settings.batch_size
        indices = range(first + rank, first + self.settings.batch_size, world)
        image = self.draw(indices)
        generator = step_generator(self.seed, step, rank)
        noise = torch.randn(len(image), 16, self.size // 8, self.size // 8, generator=generator)
        level = MAX_LEVEL * torch.rand(len(image), generator=generator)
        return {"image": image.contiguous(memory_format=torch.channels_last), "noise": noise, "level": level}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """PSNR in dB on unseen scenes, and on sprites that training never draws."""
        vae = self.module.vae
        scenes = torch.stack([draw_scene(self.seed, i, split, size=self.size).image for split in ("seen", "held_out") for i in range(128)])
        sprites = draw_unseen_sprites(self.seed, self.size)
        return {"psnr_unseen_scenes_db": psnr(reconstruct(vae, scenes), scenes).mean().item(), "psnr_unseen_sprites_db": psnr(reconstruct(vae, sprites), sprites).mean().item()}

    @torch.no_grad()
    def save(self, root: Path) -> list[Path]:
        """Ships the autoencoder in fp16, with the latent's shift and scale measured over 1,024 training pictures, so that
        z_in = (z - shift) * scale has mean 0 and standard deviation 1 (SD3's convention)."""
        vae = self.module.vae
        if not self.encoder_frozen:
            device = next(vae.parameters()).device
            chunks = [self.draw(range(i, i + 64)).to(device) for i in range(0, 1024, 64)]
            latent = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
            vae.register_to_config(shift_factor=latent.mean().item(), scaling_factor=1 / latent.std().item())
        save_half(vae, root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        """A warm start trains the decoder alone: students and cached latents rely on the shipped encoder."""
        shipped = load_autoencoder(self.scale, root / self.name)
        self.module.vae.load_state_dict(shipped.state_dict())
        self.module.vae.register_to_config(shift_factor=shipped.config.shift_factor, scaling_factor=shipped.config.scaling_factor)
        self.module.vae.encoder.requires_grad_(False)
        self.encoder_frozen = True


def draw_unseen_sprites(seed: int, size: int, count: int = 128) -> Tensor:
    """Single emoji of the `val` split, [count, 3, size, size]."""
    names = plain_names("val")
    rng = np.random.default_rng([9, seed])
    prompts = [Prompt(names[i % len(names)], "plain", (Wanted(names[i % len(names)]),)) for i in range(count)]
    return torch.stack([render(rng, prompt, size).image for prompt in prompts])
