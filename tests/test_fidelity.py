"""PSNR, SSIM and colour error against formulas and a brute-force version."""

import numpy as np
import pytest
import torch

from snapgen_core.evaluate.fidelity import colour_error, psnr, ssim


def pictures():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 16, 18, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_ssim_against_one_window_after_the_other():
    a, b = pictures()
    i = np.arange(11) - 5
    window = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for n in range(2):
        values = []
        for x, y in zip(((a[n] + 1) / 2).double().numpy(), ((b[n] + 1) / 2).double().numpy()):
            for row in range(6):
                for column in range(8):
                    p, q = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq, c = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert ssim(a, b)[n].item() == pytest.approx(np.mean(values), abs=1e-5)


def test_equal_pictures():
    a, _ = pictures()
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-5) and (psnr(a, a) >= 100).all() and (colour_error(a, a) == 0).all()


def test_colour_error_is_of_the_mean_and_in_percent():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[:, 0] += 0.06  # red too strong by 3% of the range
    assert colour_error(a, b).item() == pytest.approx(1.0)
    noisy = a + torch.tensor([0.5, -0.5]).repeat(8).view(1, 1, 4, 4)
    assert colour_error(a, noisy).item() == pytest.approx(0, abs=1e-6)
