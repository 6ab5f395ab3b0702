"""Stages `photo_autoencoder` and `photo_decoder`: the trainings of `autoencoder` and `decoder`, on photographs.

SD3's encoder cannot be shipped, so a narrow one learns from what can: crops of fourteen photos, turned and recoloured, and
emoji scenes. Six other photos are never drawn; they are what is measured. That is a look, not a benchmark.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..crops import PictureCrops
from ..data import TEST_PHOTOS, load_test_photos
from ..errors import UserError
from ..evaluate.fidelity import psnr
from ..latents import reconstruct
from ..paths import data_dir
from ..scenes import draw_scene
from .autoencoder import MIX, AutoencoderStage
from .decoder import DecoderStage


class PhotoMix:
    """indices -> [N, 3, size, size]: three crops of training photos to one emoji scene, a pure function of (seed, index).

    A crop is turned by quarters and its colours change places, or so few photos would soon be known by heart.
    """

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size
        self.crops = PictureCrops(data_dir() / "photos", size, seed, leave_out=TEST_PHOTOS)

    def __call__(self, indices: range) -> Tensor:
        return torch.stack([self.draw(index) for index in indices])

    def draw(self, index: int) -> Tensor:
        if index % 4 == 0:
            return draw_scene(self.seed, index, size=self.size, mix=MIX).image
        rng = np.random.default_rng([11, self.seed, index])
        colours, quarters = rng.permutation(3), int(rng.integers(4))
        return torch.rot90(self.crops.draw(index)[torch.from_numpy(colours)], quarters, (1, 2))


class PhotoAutoencoderStage(AutoencoderStage):
    """See `snapgen_core.train.Stage`."""

    name = "photo_autoencoder"

    def drawing(self):
        return PhotoMix(self.seed, self.size)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        photos = load_test_photos()
        return {"psnr_test_photos_db": psnr(reconstruct(self.module.vae, photos, batch=1), photos).mean().item()}


class PhotoDecoderStage(DecoderStage):
    """See `snapgen_core.train.Stage`."""

    name = "photo_decoder"
    encoder = "photo_autoencoder"

    def __init__(self, scale: str, seed: int):
        if scale != "tiny":
            raise UserError(f"the shipped photos are for tiny: at scale {scale} train the stage decoder on a folder of your own")
        super().__init__(scale, seed)

    def drawing(self, data: Path | None):
        return PhotoMix(self.seed, self.size)

    def unseen(self) -> dict[str, Tensor]:
        return {"photos": load_test_photos()}
