"""The phone's layout computes what the training modules do, and stays within 16 bits."""

import pytest
import torch
from torch import nn

from snapgen_core.export.phone import PhoneAttention, PhoneGroupNorm, PhoneLayerNorm, PhoneRmsNorm, PhoneUNet, normalise
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
from snapgen_core.unet import SnapGenUNet
from snapgen_core.unet.attention import Attention, AttentionOptions, Rope2d


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_map(tokens):
    """(B, S, C) -> (B, C, 1, S)."""
    return tokens.transpose(1, 2)[:, :, None]


@pytest.mark.parametrize("side", [8, 6])
def test_the_shipped_student_in_the_phones_shape(side):
    unet = load_unet(checkpoint_dir("tiny") / "base")
    sample, timestep, context = normal(2, 16, side, side), torch.tensor([999.0, 12.5]), normal(2, 48, 384, seed=1)
    with torch.no_grad():
        expected = unet(sample, timestep, context).sample
        found = PhoneUNet(unet, side)(sample, timestep, as_map(context))
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    assert not any(isinstance(layer, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)) for layer in PhoneUNet(unet, side).modules())


@pytest.mark.parametrize("kv_heads", [1, 2, None])
@pytest.mark.parametrize("turns", [True, False])
def test_attention_head_by_head(kv_heads, turns):
    torch.manual_seed(0)
    attention = Attention(32, 32, AttentionOptions(32, 8, kv_heads, 3, True, 100.0, 8))
    rope = Rope2d(8, 100.0)(3, 4) if turns else None
    x = normal(2, 12, 32)
    maps = tuple(table.permute(1, 2, 0)[:, :, None] for table in rope) if turns else None
    with torch.no_grad():
        assert torch.allclose(PhoneAttention(attention)(as_map(x), as_map(x), maps), as_map(attention(x, rope=rope)), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_norms(scale):
    torch.manual_seed(0)
    x = scale * normal(2, 32, 3, 5)
    for theirs, ours, given in (
        (nn.GroupNorm(4, 32), PhoneGroupNorm, x),
        (nn.LayerNorm(32), PhoneLayerNorm, x.flatten(2)[:, :, None]),
        (nn.RMSNorm(32, eps=1e-6), PhoneRmsNorm, x.flatten(2)[:, :, None]),
    ):
        for p in theirs.parameters():
            nn.init.normal_(p)
        expected = theirs(given) if isinstance(theirs, nn.GroupNorm) else as_map(theirs(given[:, :, 0].transpose(1, 2)))
        assert torch.allclose(ours(theirs)(given), expected, atol=1e-4), type(theirs)


def test_squares_do_not_leave_16_bits():
    x = 3000 * normal(1, 64, 1, 5)
    assert x.half().square().isinf().any()
    for centre in (True, False):
        half, full = normalise(x.half(), (1,), 1e-6, centre), normalise(x, (1,), 1e-6, centre)
        assert half.isfinite().all() and (half.float() - full).abs().max() < 0.01


def test_the_original_stays_as_it_is():
    torch.manual_seed(0)
    unet = SnapGenUNet.from_preset("tiny")
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    phone = PhoneUNet(unet, 8)
    assert all(torch.equal(before[name], p) for name, p in unet.state_dict().items())
    assert sum(p.numel() for p in phone.parameters()) == sum(p.numel() for p in unet.parameters())
