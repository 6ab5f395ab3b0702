"""The task loss on scenes that no training has drawn: the same scenes, noise and noise levels for every network."""

import torch
from torch import Tensor

from .. import flow
from ..latents import encode, load_autoencoder
from ..scales import get_scale
from ..scenes import draw_scene
from ..text import load_text_encoders

SCENE_SEED = 1_000_003  # training draws its scenes with small seeds


@torch.no_grad()
def validation_batch(scale: str, scenes: int = 512) -> dict[str, Tensor]:
    """x0, eps [N, 16, h, w], sigma [N] and context [N, L, D] of `scenes` unseen scenes, no encoder dropped.

    The noise levels are the quantiles of the training's distribution in place of draws from it: less spread, same mean.
    """
    config = get_scale(scale)
    drawn = [draw_scene(SCENE_SEED, index, size=config.image_size) for index in range(scenes)]
    x0 = encode(load_autoencoder(scale), torch.stack([scene.image for scene in drawn]))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SCENE_SEED))
    quantiles = (torch.arange(scenes, dtype=torch.float64) + 0.5) / scenes
    sigma = flow.time_shift(torch.sigmoid(torch.special.ndtri(quantiles)).float(), config.shift)
    order = torch.randperm(scenes, generator=torch.Generator().manual_seed(SCENE_SEED))
    context = load_text_encoders(config).encode([scene.prompt.text for scene in drawn])
    return {"x0": x0, "eps": eps, "sigma": sigma[order], "context": context}


@torch.no_grad()
def validation_losses(unet, batch: dict[str, Tensor], size: int = 64) -> Tensor:
    """Eq. 2 of each scene of `batch`, [N]."""
    losses = []
    for x0, eps, sigma, context in zip(*(batch[name].split(size) for name in ("x0", "eps", "sigma", "context"))):
        v = unet(flow.interpolate(x0, eps, sigma), flow.TIMESTEPS * sigma, context).sample
        losses.append(flow.flow_matching_loss(v, x0, eps))
    return torch.cat(losses)
