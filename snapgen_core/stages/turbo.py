"""Stage `turbo`: the tiny twin of SD3.5-Large-Turbo, the teacher brought to four steps without guidance.

A guided run of 28 steps passes the four levels at which a run of four steps stops. From each of them the few-step teacher
learns to be at the next one in a single step: the straight line between two places of the long run is a velocity, and the
regression on it is that of Eq. 4. Pieces of a path are straighter than the whole [Yan et al. 2024].
"""

from functools import cached_property

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from .. import flow
from ..devices import best_device
from ..distill import output_loss
from ..paths import checkpoint_dir
from ..scales import get_scale
from ..teachers import Teacher, guided_velocity, load_transformer
from ..train import TrainSettings, step_generator
from .teacher import TwinStage

STEPS, LONG = 4, 28  # of the few-step teacher, of the runs that it learns from
GUIDANCE = 4.0  # of those runs


class TurboTraining(nn.Module):
    """forward(x [B,16,h,w], target [B,16,h,w], sigma [B], context [B,L,D], pooled [B,P]) -> (mean squared error, figures)."""

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, target: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        v = self.transformer(x, context, pooled, flow.TIMESTEPS * sigma).sample
        return output_loss(target, v).mean(), {}


class TurboStage(TwinStage):
    """See `snapgen_core.train.Stage`."""

    name = "turbo"
    options: dict[str, str] = {}
    steps, guidance = STEPS, 1.0

    def __init__(self, scale: str, seed: int):
        self.scale, self.seed = scale, seed
        self.module = TurboTraining(load_transformer(checkpoint_dir(scale) / "teacher"))
        self.settings = TrainSettings(batch_size=64, learning_rate=2e-4, steps=2_000)

    @cached_property
    def guide(self) -> Teacher:
        return Teacher(load_transformer(checkpoint_dir(self.scale) / "teacher")).to(best_device())

    def prepare(self) -> None:
        super().prepare()
        self.guide  # noqa: B018

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """The pieces of a few long runs: each gives one sample for every level."""
        generator = step_generator(self.seed, step, rank, best_device())
        latents, captions = self.data.pick(self.settings.batch_size // world // STEPS, generator)
        context, pooled = self.text(captions)
        places = self.places(torch.randn(latents.shape, generator=generator, device=latents.device), context, pooled)
        sigmas = flow.inference_sigmas(STEPS, get_scale(self.scale).shift).to(latents.device)
        target = torch.cat([straight(x, x_next, *pair) for x, x_next, pair in zip(places, places[1:], zip(sigmas, sigmas[1:]))])
        sigma = sigmas[:-1].repeat_interleave(len(captions))
        return {"x": torch.cat(places[:-1]), "target": target, "sigma": sigma, "context": context.repeat(STEPS, 1, 1), "pooled": pooled.repeat(STEPS, 1)}

    @torch.no_grad()
    def places(self, noise: Tensor, context: Tensor, pooled: Tensor) -> list[Tensor]:
        """Where long guided runs from `noise` [B,16,h,w] are at the STEPS + 1 levels of short ones."""
        both = (torch.cat([torch.zeros_like(part), part]).to(noise.device) for part in (context, pooled))
        sigmas = flow.inference_sigmas(LONG, get_scale(self.scale).shift)
        run = [noise, *(x for _, x, _ in flow.trajectory(guided_velocity(self.guide, *both, GUIDANCE), noise, sigmas))]
        return run[:: LONG // STEPS]


def straight(x: Tensor, x_next: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The velocity that goes from `x` at level `sigma` to `x_next` at `sigma_next` in one step of Eq. 3."""
    return (x_next - x) / (sigma_next - sigma)
