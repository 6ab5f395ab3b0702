"""How faithful is a reconstruction? PSNR, SSIM, colour error; all of pictures [N, 3, H, W] in [-1, 1], a number each."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity [Wang et al. 2004], [N], 1 for equal pictures: the mean over colours and over all places
    where the Gaussian window fits."""
    offsets = torch.arange(window, device=a.device, dtype=a.dtype) - window // 2
    gauss = torch.exp(-offsets.square() / (2 * sigma**2))
    gauss = gauss / gauss.sum()

    def blur(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(x, gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1)).unflatten(0, a.shape[:2])[:, :, 0]

    a, b = (a + 1) / 2, (b + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * both + 0.03**2) / (var_a + var_b + 0.03**2)
    return (light * structure).flatten(1).mean(1)


def colour_error(a: Tensor, b: Tensor) -> Tensor:
    """How far the mean colour of a picture is off, [N], in percent of the range: the colour shift of Sec. 3.2."""
    return 50 * (a.mean((2, 3)) - b.mean((2, 3))).abs().mean(1)
