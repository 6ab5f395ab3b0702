"""Notebook 01: the checkers of its exercises."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from ..profile import count_macs, count_parameters
from ..scales import UNET_PRESETS, UNetPreset
from ..unet import SnapGenUNet
from ..unet.attention import AttentionOptions, TransformerLayer
from ..unet.blocks import conv3x3
from .verdict import Verdict, call, right, wrong


def check_separable(answer: Callable[[int, int], int]) -> Verdict:
    """01, exercise 1: answer(c_in, c_out) is the number of parameters of a separable 3x3 convolution."""
    for c_in, c_out in ((8, 8), (16, 48), (320, 640)):
        value, failed = call(answer, c_in, c_out)
        if failed is not None:
            return failed
        expected = count_parameters(conv3x3(c_in, c_out, separable=True))
        if value != expected:
            hints = {
                9 * c_in * c_out + c_out: " That is a dense one.",
                9 * c_in * c_out: " That is a dense one, without its bias.",
                9 * c_in + c_in * c_out: " The pointwise half has a bias, one number for each output channel.",
                9 * c_in + c_in + c_in * c_out + c_out: " The depthwise half has no bias: the pointwise one would only add another constant to it.",
                9 * c_out + c_in * c_out + c_out: " The depthwise half comes first: it works on the input's channels.",
            }
            return wrong(f"from {c_in} to {c_out} channels it is not {value}.{hints.get(value, '')}")
    return right("for many channels nearly all of it is the pointwise matrix, a ninth of a dense convolution.")


def check_layer_macs(answer: Callable[[int, int, int, int, int], int]) -> Verdict:
    """01, exercise 2: answer(S, C, L, D, E) counts a transformer layer with cross-attention and GEGLU of ratio 3."""
    for S, C, L, D, E in ((100, 64, 7, 48, 16), (64, 96, 48, 384, 32), (16384, 256, 154, 2304, 64)):
        value, failed = call(answer, S, C, L, D, E)
        if failed is not None:
            return failed
        with torch.device("meta"):
            layer = TransformerLayer(C, False, AttentionOptions(D, E, 1, 3, True, None, 8))
            expected = count_macs(layer, torch.empty(1, S, C), torch.empty(1, L, D), None)
        if value != expected:
            keys_and_values, products, feed_forward = 2 * L * D * E, 2 * S * L * C, 9 * S * C * C
            hints = {
                expected - keys_and_values: " Keys and values are missing: two matrices of D x E for each text token.",
                expected - keys_and_values + 2 * L * D * C: " With one key and value for all heads, they have E channels and not C.",
                expected - products: " The products are missing: queries with keys, and weights with values.",
                expected - products // 2: " There are two products: queries with keys, and weights with values.",
                expected - products + 2 * S * S * C: " The image looks at L text tokens here, not at itself.",
                expected - S * C * C: " The output of the attention passes a C x C projection, too.",
                expected - 3 * S * C * C: " GEGLU's first projection is twice as wide: one half gates the other.",
                expected - feed_forward: " The feed-forward layer is missing.",
            }
            return wrong(f"for S={S}, C={C}, L={L}, D={D}, E={E} the counter finds another number than {value}.{hints.get(value, '')}")
    return right("and that is what the counter of this notebook finds. Keys and values hardly matter; S does, everywhere.")


def check_design(design: UNetPreset) -> Verdict:
    """01, exercise 3: a text-to-image UNet of 180 to 220 M parameters and at most 340 GMACs at 128x128, no step undone."""
    if not isinstance(design, UNetPreset):
        return wrong("give a preset: replace(UNET_PRESETS['paper'], channels=..., ...).")
    free = {"channels", "transformer_depth", "ffn_ratio", "expansion", "layers_per_block", "time_embed_dim"}
    for name, value in asdict(UNET_PRESETS["paper"]).items():
        if name not in free and getattr(design, name) != value:
            return wrong(f"{name} must stay {value}: the steps of this notebook, and what goes in and out, are kept.")
    if design.ffn_ratio > 3 or design.expansion < 2:
        return wrong("a wider feed-forward layer undoes step (d), a smaller expansion step (c).")
    if len(design.channels) != 3 or not all(design.transformer_depth):
        return wrong("three stages, please, each with transformers: the text comes in from the first one on.")
    try:
        with torch.device("meta"):
            unet = SnapGenUNet(**asdict(design))
            parameters = count_parameters(unet) / 1e6
            macs = count_macs(unet, torch.empty(1, 16, 128, 128), torch.empty(1), torch.empty(1, 154, 2304)) / 1e9
    except (ValueError, TypeError, RuntimeError) as error:
        return wrong(f"it cannot be built: {error}")
    found = f"it has {parameters:.0f} M parameters and {macs:.0f} GMACs"
    if macs > 340:
        return wrong(f"{found}: too much to compute. Where do the MACs sit?")
    if parameters > 220:
        return wrong(f"{found}: too much to store. Where do the parameters sit?")
    if parameters < 180:
        return wrong(f"{found}: smaller than asked. The phone has room for 180 M at least.")
    return right(f"{found}. Whether it draws as well, only training will tell.")
