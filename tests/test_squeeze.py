"""The student in fewer bits: calibrated on its own runs, tuned, drawing as a student does, and stored as it was squeezed."""

import pytest
import torch

from snapgen_core import flow, load
from snapgen_core.errors import UserError
from snapgen_core.export import squeeze
from snapgen_core.export.palettize import palettizable
from snapgen_core.export.phone import PhoneUNet
from snapgen_core.export.replay import psnr_db


@pytest.fixture(scope="module")
def pipe():
    return load("tiny", "base", decoder="tiny")


@pytest.fixture(scope="module")
def batches(pipe):
    return squeeze.calibration(pipe, guided=True)


def test_calibration_is_what_the_student_meets(pipe, batches):
    """As many samples as network calls, at the sampler's levels, half of them unconditional; the first ones are pure noise."""
    samples, timesteps, context = (torch.cat(parts) for parts in zip(*batches))
    assert len(samples) == 2 * squeeze.PROMPTS * squeeze.STEPS and context.shape[1:] == (384, 1, 48)
    levels = (flow.TIMESTEPS * flow.inference_sigmas(squeeze.STEPS)[:-1]).sort().values
    assert torch.allclose(timesteps.unique(), levels, rtol=1e-5)
    assert (~context.flatten(1).any(dim=1)).float().mean() == 0.5
    assert samples[timesteps == 1000].std().item() == pytest.approx(1, abs=0.02)
    assert len(batches[0][1].unique()) > 3  # shuffled
    again = squeeze.calibration(pipe, guided=True)
    assert all(torch.equal(a, b) for a, b in zip(batches[3], again[3]))


def test_half_the_bits_in_a_quarter_of_the_room_and_tuning_helps(pipe, batches):
    phone, plain = PhoneUNet(pipe.unet, 8), PhoneUNet(pipe.unet, 8)
    palettes, figures = squeeze.squeeze(phone, batches[:4], 4.3, tune_steps=12, progress=False)
    assert 4.2 < figures["bits"] <= 4.3 and figures["bytes"] < 0.3 * 2 * sum(p.numel() for p in plain.parameters())
    assert 0 < figures["layers_at_8_bits"] < figures["layers"] == len(palettes) == len(palettizable(phone))
    assert all(len(layer.weight.unique()) <= (256 if palettes[name].bits == 8 else 16) for name, layer in palettizable(phone).items())
    assert figures["error_after"] < figures["error_before_tuning"]
    with torch.no_grad():
        assert figures["psnr_db"] == pytest.approx(min(psnr_db(plain(*batch), phone(*batch)) for batch in batches[:4]), abs=0.01)


def test_written_back_it_is_the_phones_network(pipe, batches):
    """Palettes and tuned norms included."""
    other, phone = load("tiny", "base").unet, PhoneUNet(pipe.unet, 8)
    squeeze.squeeze(phone, batches[:1], 4.0, tune_steps=2, progress=False)
    phone.write_back(other)
    samples, timesteps, context = batches[0]
    with torch.no_grad():
        written, plain = (unet(samples, timesteps, context[:, :, 0].transpose(1, 2)).sample for unet in (other, pipe.unet))
        assert torch.allclose(written, phone(samples, timesteps, context), atol=1e-4) and not torch.allclose(written, plain, atol=1e-2)


def test_rounded_to_16_bits_it_draws_the_same(pipe):
    ours = pipe("a red car", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    rounded = load("tiny", "base", decoder="tiny")
    figures = squeeze.squeeze_pipeline(rounded, 16, guided=True)
    theirs = rounded("a red car", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert psnr_db(ours, theirs) > 60 and figures == {"bits": 16.0, "bytes": 2 * sum(p.numel() for p in pipe.unet.parameters())}


@pytest.mark.parametrize("bits", [3.9, 8.5, float("nan")])
def test_other_widths_are_refused(pipe, bits):
    with pytest.raises(UserError, match="4 to 8 bits"):
        squeeze.squeeze(PhoneUNet(pipe.unet, 8), [], bits)
