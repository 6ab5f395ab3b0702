"""Stage `ablation`: does each step of Fig. 3 also learn better? Its seven networks, side by side on the same batches."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import flow
from ..errors import UserError
from ..evaluate import evaluate_unet, load_detector, validation_batch, validation_losses
from ..scales import ABLATION, get_scale
from ..train import TrainSettings, step_generator
from ..unet import SnapGenUNet
from ..weights import save_half
from .base import TrainingSet, draw_batch


class AblationTraining(nn.Module):
    """forward(x0, eps [B,16,h,w], sigma [B], context [B,L,D]) -> (sum of Eq. 2 over the networks, Eq. 2 of each).

    The networks share scenes, noise and noise levels, so that the differences between them are theirs. The sum's
    gradient is each one's own, and AdamW works on every number for itself.
    """

    def __init__(self):
        super().__init__()
        self.unets = nn.ModuleDict({letter: SnapGenUNet.from_preset(f"tiny-ablation-{letter}") for letter in ABLATION})

    def forward(self, x0: Tensor, eps: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = flow.interpolate(x0, eps, sigma)
        losses = {
            f"loss_{letter}": flow.flow_matching_loss(unet(x, flow.TIMESTEPS * sigma, context).sample, x0, eps).mean()
            for letter, unet in self.unets.items()
        }
        return sum(losses.values()), losses


class AblationStage:
    """See `snapgen_core.train.Stage`. The seed decides on weights, order and noise; the scenes are those of `base`."""

    name = "ablation"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        if scale != "tiny":
            raise UserError(f"the ablation is trained at tiny only, not at {scale}: at the paper's size its networks are the presets ablation-a to ablation-g")
        self.scale, self.seed = scale, seed
        torch.manual_seed(seed)
        self.module = AblationTraining().to(memory_format=torch.channels_last)
        # The gradient's norm is that of seven networks together, where each alone would be clipped at 1.
        self.settings = TrainSettings(batch_size=32, learning_rate=8e-4, steps=1_000, clip_norm=len(ABLATION) ** 0.5)

    @cached_property
    def data(self) -> TrainingSet:
        return TrainingSet(self.scale, seed=0)

    def prepare(self) -> None:
        load_detector()
        self.data  # noqa: B018

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        return draw_batch(self.data, self.settings.batch_size // world, step_generator(self.seed, step, rank), get_scale(self.scale).shift)[0]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Validation loss and SceneEval at 28 guided steps of each network."""
        scores, batch = {}, validation_batch(self.scale)
        for letter, unet in self.module.unets.items():
            scores[f"{letter}.validation_loss"] = validation_losses(unet, batch).mean().item()
            scores |= {f"{letter}.{name}": value for name, value in evaluate_unet(self.scale, unet, images=50).items()}
        return scores

    def save(self, root: Path) -> list[Path]:
        folders = [root / f"ablation-{letter}" for letter in ABLATION]
        for unet, folder in zip(self.module.unets.values(), folders):
            save_half(unet, folder)
        return folders

    def load(self, root: Path) -> None:
        raise UserError("the ablation compares networks from scratch: it has no warm start")
