"""Stage `decoder_norms`: what GroupNorm does for the decoder's colours (Sec. 3.2, change 2). Three decoders on the same batches."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..decoder import NORMS, TinyDecoder
from ..errors import UserError
from ..evaluate.fidelity import colour_error, psnr
from ..latents import reconstruct
from ..perceptual import Lite0Distance
from ..scales import DECODER_PRESETS
from ..weights import save_half
from .decoder import PERCEPTUAL, DecoderStage


class NormsTraining(nn.Module):
    """forward(image [B,3,S,S], latent [B,16,S/8,S/8]) -> (sum of MSE + perceptual loss over the decoders, MSE of each)."""

    def __init__(self, seed: int):
        super().__init__()
        self.decoders = nn.ModuleDict()
        for norm in NORMS:
            torch.manual_seed(seed)  # norms draw nothing, so all three begin with the same convolutions
            self.decoders[norm] = TinyDecoder(**asdict(replace(DECODER_PRESETS["tiny"], norm=norm)))
        self.distance = Lite0Distance()

    def forward(self, image: Tensor, latent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, figures = 0, {}
        for norm, decoder in self.decoders.items():
            made = decoder(latent).sample
            mse = (made - image).square().mean()
            total = total + mse + PERCEPTUAL["lite0"] * self.distance(made, image).mean()
            figures[f"mse_{norm}"] = mse.detach()
        return total, figures


class DecoderNormsStage(DecoderStage):
    """See `snapgen_core.train.Stage`."""

    name = "decoder_norms"

    def __init__(self, scale: str, seed: int):
        if scale != "tiny":
            raise UserError(f"the three decoders are trained at tiny only, not at {scale}")
        super().__init__(scale, seed)
        self.settings = replace(self.settings, steps=2_000)  # not clipped: each learns as if it were alone

    def build(self) -> nn.Module:
        return NormsTraining(self.seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        return {name: value for name, value in super().batch(step, rank, world).items() if name != "judged"}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        scores, images = {}, self.unseen()["scenes"]
        for norm, decoder in self.module.decoders.items():
            made = reconstruct(self.vae, images, decoder)
            error = colour_error(made, images)
            scores |= {f"{norm}.psnr_db": psnr(made, images).mean().item(), f"{norm}.colour_error": error.mean().item()}
            scores[f"{norm}.colour_error_worst"] = error.max().item()
        return scores

    def save(self, root: Path) -> list[Path]:
        folders = [root / f"decoder-norm-{norm}" for norm in NORMS]
        for decoder, folder in zip(self.module.decoders.values(), folders):
            save_half(decoder, folder)
        return folders

    def load(self, root: Path) -> None:
        raise UserError("the three decoders are compared from scratch: they have no warm start")
