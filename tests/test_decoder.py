"""TinyDecoder: against diffusers' decoder of SD3, against the published counts, in bands and whole, and at its door."""

import warnings
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from snapgen_core.decoder import BAND, LatentRangeWarning, TinyDecoder, Upsample, in_bands
from snapgen_core.errors import UserError
from snapgen_core.figures import published
from snapgen_core.profile import count_macs, count_parameters, macs_by_module
from snapgen_core.scales import DECODER_PRESETS, DecoderPreset, get_scale

CHANGES = ["sd3", "change-1", "change-2", "change-3", "change-4", "change-5"]
SMALL = DecoderPreset(channels=(32, 24, 16, 8), norm_groups=8)


def small(**changes) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(**asdict(replace(SMALL, **changes))).eval()


def counted(preset: str, size: int = 128) -> tuple[int, int]:
    with torch.device("meta"):
        decoder = TinyDecoder.from_preset(preset)
        return count_parameters(decoder), count_macs(decoder, torch.empty(1, 16, size, size))


def renamed(name: str) -> str:
    """A parameter's name in diffusers' decoder -> its name in ours."""
    parts = name.replace("conv_shortcut", "shortcut").replace("to_out.0", "to_out").replace("group_norm", "norm").split(".")
    if parts[0] == "mid_block":  # residual, attention, residual
        return ".".join(["mid_block", "1" if parts[1] == "attentions" else str(2 * int(parts[2])), *parts[3:]])
    if parts[0] == "up_blocks":
        stage = int(parts[1])
        if parts[2] == "upsamplers":  # theirs end with a step up, ours begin with it
            return ".".join(["stages", str(stage + 1), "upsample", *parts[4:]])
        return ".".join(["stages", str(stage), "blocks", *parts[3:]])
    return name.replace("conv_norm_out", "norm_out")


def test_with_all_switches_at_sd3_it_is_diffusers_decoder():
    torch.manual_seed(0)
    theirs = AutoencoderKL(**get_scale("tiny").autoencoder | {"layers_per_block": 2}).eval()
    ours = TinyDecoder(**asdict(replace(DECODER_PRESETS["sd3"], channels=(160, 96, 48, 24), norm_groups=8))).eval()
    ours.load_state_dict({renamed(name): value for name, value in theirs.decoder.state_dict().items()})
    latent = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        assert torch.allclose(ours(latent).sample, theirs.decode(latent).sample, atol=1e-4)


def test_counts_are_the_published_ones():
    rows = {row["model"]: row for row in published("snapgen")["decoder"]}
    parameters, macs = counted("paper")
    assert parameters / 1e6 == pytest.approx(rows["SnapGen"]["parameters_m"], rel=0.005)
    assert macs / 1e9 == pytest.approx(rows["SnapGen"]["macs_g"], rel=0.02)
    sd3, sd3_macs = counted("sd3")
    assert sd3 / 1e6 == pytest.approx(rows["SD3"]["parameters_m"], rel=0.001)
    assert sd3_macs / 1e9 == pytest.approx(5236, rel=0.001)  # the paper's 4970 leaves out the products of attention
    assert sd3 / parameters == pytest.approx(35.9, rel=0.005)


def test_counts_by_module_add_up_to_the_whole():
    with torch.device("meta"):
        macs = macs_by_module(TinyDecoder.from_preset("sd3"), torch.empty(1, 16, 128, 128))
    assert sum(macs[name] for name in ("conv_in", "mid_block", "stages.0", "stages.1", "stages.2", "stages.3", "conv_out")) == macs[""]


def test_every_change_saves_something_and_the_last_is_the_paper():
    counts = [counted(name) for name in CHANGES]
    parameters, macs = zip(*counts)
    assert all(before > after for before, after in pairwise(parameters))
    assert macs[1] == macs[2]  # norms have no MACs by our count
    assert all(before > after for before, after in pairwise(macs[:2] + macs[3:]))
    assert counts[0][1] - counts[1][1] > 2 * 128**4 * 512  # the two products of attention, and the projections
    assert DECODER_PRESETS["change-5"] == DECODER_PRESETS["paper"]


@pytest.mark.parametrize("norm", ["all", "minimal", "none"])
def test_norms_are_where_the_switch_says(norm):
    decoder = small(norm=norm)
    normed = [name for name, module in decoder.named_modules() if isinstance(module, nn.GroupNorm)]
    if norm == "minimal":
        assert normed and all(name.startswith("stages.0") for name in normed)
    else:
        assert len(normed) == (15 if norm == "all" else 0)


def test_folded_upsampling_is_a_convolution_of_doubled_pixels():
    torch.manual_seed(0)
    upsample, x = Upsample(5, 3), torch.randn(2, 5, 6, 4, requires_grad=True)
    out = upsample(x)
    plain = upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(out, plain, atol=1e-5)
    toward = torch.randn(out.shape)
    tensors = [x, upsample.conv.weight, upsample.conv.bias]
    for one, other in zip(torch.autograd.grad(out, tensors, toward), torch.autograd.grad(plain, tensors, toward)):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("height", [1, BAND // 2, BAND, 2 * BAND + 3])
@pytest.mark.parametrize("conv_shortcut", [False, True])
def test_bands_have_no_seams(height, conv_shortcut):
    decoder = small(conv_shortcut=conv_shortcut, blocks=(1, 3, 2, 1))
    latent = torch.randn(1, 16, height, 7)
    with torch.no_grad():
        banded = decoder(latent).sample
    whole = decoder(latent).sample  # with gradients nothing is cut
    assert whole.requires_grad and torch.allclose(banded, whole, atol=1e-5)


def test_bands_need_the_rows_around_them():
    """The check above can fail: with too small a surrounding there are seams."""
    stage = small().stages[1]
    x = torch.randn(1, 32, 12, 4)
    with torch.no_grad():
        assert torch.allclose(in_bands((stage,), x, rows=4), stage(x), atol=1e-5)
        pieces = torch.cat([stage(part) for part in x.split(4, dim=2)], dim=2)
    assert not torch.allclose(pieces, stage(x), atol=1e-3)


def test_a_decoder_with_all_norms_is_never_cut(monkeypatch):
    monkeypatch.setattr("snapgen_core.decoder.in_bands", None)  # would fail if it were called
    with torch.no_grad():
        assert small(norm="all")(torch.randn(1, 16, 40, 4)).sample.shape == (1, 3, 320, 32)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    decoder, latent = small(), torch.randn(1, 16, 4, 4)
    decoder.save_pretrained(tmp_path)
    again = TinyDecoder.from_pretrained(tmp_path).eval()
    assert torch.equal(decoder(latent).sample, again(latent, return_dict=False)[0])
    assert [path.name for path in tmp_path.glob("*.safetensors")] and not list(tmp_path.glob("*.bin"))


def test_compiles_without_graph_breaks():
    decoder, latent = small(), torch.randn(1, 16, 4, 4)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(latent).sample, decoder(latent).sample, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16, 8, 8), (1, 16, 8, 8, 1)])
def test_a_latent_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"latent must be \[B, 16, h, w\], got \["):
        small()(torch.randn(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_refused(bad):
    latent = torch.randn(1, 16, 4, 4)
    latent[0, 3, 1, 2] = bad
    with pytest.raises(ValueError, match="1 numbers that are not finite"):
        small()(latent)


@pytest.mark.parametrize(("scale", "shift"), [(8.0, 0.0), (0.1, 0.0), (1.0, 3.0)])
def test_a_latent_that_nobody_normalised_is_named(scale, shift):
    with pytest.warns(LatentRangeWarning, match="normalise it first"):
        small()(scale * torch.randn(1, 16, 8, 8) + shift)


def test_a_normalised_latent_is_taken_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small()(torch.randn(1, 16, 8, 8))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": (32,), "blocks": (1,)}, "at least two stages"),
        ({"blocks": (1, 2)}, "blocks needs a value for each of 4 stages"),
        ({"norm": "some"}, "norm must be one of all, minimal, none"),
        ({"norm_groups": 7}, "multiples of norm_groups=7"),
        ({"attention": True}, "needs middle=True"),
        ({"conv_shortcut": True, "blocks": (2, 0, 1, 1)}, "every stage needs one"),
    ],
)
def test_switches_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        small(**changes)


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown decoder preset 'huge'"):
        TinyDecoder.from_preset("huge")
