"""Stage `decoder`: the tiny decoder learns to read a frozen autoencoder's latents (Sec. 3.2, "Training of the Decoder")."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, fooling_loss
from ..crops import PictureCrops
from ..data import load_test_photos
from ..decoder import TinyDecoder
from ..devices import best_device
from ..errors import UserError
from ..evaluate.fidelity import colour_error, psnr, ssim
from ..latents import encode, load_autoencoder, load_decoder, reconstruct
from ..paths import checkpoint_dir
from ..perceptual import perceptual_distance
from ..scales import get_scale
from ..scenes import draw_images, draw_scene
from ..train import TrainSettings, step_generator
from ..weights import save_half
from .autoencoder import MIX, draw_unseen_sprites

# Weights beside the MSE's 1; the paper names none. That of Lite0 was tuned at tiny, that of LPIPS is a first guess.
PERCEPTUAL, ADVERSARIAL = {"lite0": 0.01, "lpips": 0.05}, 0.05
MAX_LEVEL = 0.2  # the strongest noise on latents at tiny, in units of their standard deviation


class DecoderTraining(nn.Module):
    """forward(image [B,3,S,S], latent [B,16,S/8,S/8], judged [1]) -> (loss, figures).

    MSE + perceptual + adversarial loss; no KL term, for the encoder stays as it is. The discriminator learns in the same
    backward pass, on pictures that carry no gradient. While `judged` is 0 the decoder does not listen to it yet.
    """

    def __init__(self, decoder: TinyDecoder, perceptual: str = "lite0"):
        super().__init__()
        self.decoder = decoder
        self.discriminator = PatchDiscriminator()
        self.distance, self.weight = perceptual_distance(perceptual), PERCEPTUAL[perceptual]

    def forward(self, image: Tensor, latent: Tensor, judged: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.decoder(latent).sample
        mse = (made - image).square().mean()
        perceptual = self.distance(made, image).mean()
        reconstruction = mse + self.weight * perceptual
        judge = discriminator_loss(self.discriminator(image), self.discriminator(made.detach()))
        loss = reconstruction + judge
        if judged:
            fooling = fooling_loss(self.discriminator, made)
            loss = loss + ADVERSARIAL * adaptive_weight(reconstruction, fooling, self.decoder.conv_out.weight) * fooling
        return loss, {"mse": mse.detach(), "perceptual": perceptual.detach(), "discriminator": judge.detach()}


class DecoderStage:
    """See `snapgen_core.train.Stage`.

    Args:
        data: a folder of pictures or of WebDataset shards (default at `tiny`: emoji scenes).
        perceptual: "lpips", as in the paper, or "lite0", which needs no network (default at `tiny`).
    """

    name = "decoder"
    encoder = "autoencoder"  # whose latents it reads

    def __init__(self, scale: str, seed: int, data: Path | None = None, perceptual: str | None = None):
        self.scale, self.seed = scale, seed
        if data is None and get_scale(scale).hub:
            raise UserError(f"at scale {scale} the decoder learns from photographs: name a folder of them, or of WebDataset shards, with --data")
        self.size = 64 if scale == "tiny" else 256  # Sec. 3.2: "trained on 256^2 image patches"
        self.perceptual = perceptual or ("lite0" if scale == "tiny" else "lpips")
        self.options = {name: str(value) for name, value in {"data": data, "perceptual": perceptual}.items() if value is not None}
        self.draw = self.drawing(data)
        self.judged_from = 1_500 if scale == "tiny" else 50_000  # steps; before that, pictures are too poor to be judged
        torch.manual_seed(seed)
        self.module = self.build().to(memory_format=torch.channels_last)
        # Not clipped: the discriminator's gradients are far larger than the decoder's, and would decide for both.
        if scale == "tiny":
            self.settings = TrainSettings(batch_size=16, learning_rate=2e-3, betas=(0.9, 0.99), clip_norm=None, steps=6_000)
        else:  # batch and steps of Sec. 3.2; rate and betas are ours
            self.settings = TrainSettings(batch_size=256, learning_rate=1e-4, betas=(0.9, 0.99), clip_norm=None, steps=1_000_000)

    def build(self) -> nn.Module:
        return DecoderTraining(TinyDecoder.from_preset(self.scale), self.perceptual)

    def drawing(self, data: Path | None) -> Callable[[range], Tensor]:
        """indices -> pictures [N,3,S,S]."""
        if data is None:
            return lambda indices: draw_images(self.seed, indices, size=self.size, mix=MIX)
        return PictureCrops(data, self.size, self.seed)

    @cached_property
    def vae(self):
        vae = load_autoencoder(self.scale, None if get_scale(self.scale).hub else checkpoint_dir(self.scale) / self.encoder)
        return vae.to(best_device(), memory_format=torch.channels_last)

    def prepare(self) -> None:
        self.vae  # noqa: B018

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        first = step * self.settings.batch_size
        image = self.draw(range(first + rank, first + self.settings.batch_size, world))
        latent = encode(self.vae, image).cpu()
        generator = step_generator(self.seed, step, rank)
        if self.scale == "tiny":  # a small student's latents are off by more than a large one's
            level = MAX_LEVEL * torch.rand(len(image), 1, 1, 1, generator=generator)
            latent = latent + level * torch.randn(latent.shape, generator=generator)
        judged = torch.tensor([float(step >= self.judged_from)])
        return {"image": image.contiguous(memory_format=torch.channels_last), "latent": latent, "judged": judged}

    def unseen(self) -> dict[str, Tensor]:
        """Pictures that no training has drawn."""
        if get_scale(self.scale).hub:
            return {"photos": load_test_photos()}
        scenes = [draw_scene(self.seed, i, split, size=self.size).image for split in ("seen", "held_out") for i in range(128)]
        return {"scenes": torch.stack(scenes), "sprites": draw_unseen_sprites(self.seed, self.size)}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """PSNR (mean and standard deviation over the pictures) of this decoder, of the autoencoder's own, and by how much the
        one is behind the other; SSIM, perceptual distance and colour error of this one."""
        scores = {}
        for name, images in self.unseen().items():
            ours, full = reconstruct(self.vae, images, self.module.decoder), reconstruct(self.vae, images)
            tiny_db, full_db = psnr(ours, images), psnr(full, images)
            for key, db in {"psnr": tiny_db, "full_psnr": full_db, "behind": full_db - tiny_db}.items():
                scores |= {f"{name}.{key}_db": db.mean().item(), f"{name}.{key}_spread_db": db.std().item()}
            for key, measure in {"ssim": ssim, self.perceptual: self.module.distance, "colour_error": colour_error}.items():
                scores[f"{name}.{key}"] = measure(ours, images).mean().item()
        return scores

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.decoder, root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        self.module.decoder.load_state_dict(load_decoder(root / self.name).state_dict())
