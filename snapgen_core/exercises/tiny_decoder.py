"""Notebook 02: the checkers of its exercises."""

from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from ..decoder import TinyDecoder
from ..profile import count_macs, count_parameters
from ..scales import DECODER_PRESETS, DecoderPreset
from .verdict import Verdict, call, right, wrong


def check_residual(answer: Callable[[int], int]) -> Verdict:
    """02, exercise 1: answer(c) is the parameter count of a separable residual block of c channels without norms."""
    for c in (24, 96, 256):
        value, failed = call(answer, c)
        if failed is not None:
            return failed
        if value != 2 * (9 * c + c * c + c):
            hints = {
                9 * c + c * c + c: "that is one of its two convolutions.",
                2 * (9 * c * c + c): "that is a block of dense convolutions.",
                2 * (9 * c + c * c): "the pointwise convolutions have a bias.",
                2 * (9 * c + c + c * c + c): "the depthwise convolutions have no bias.",
            }
            return wrong(hints.get(value, f"for {c} channels it is not {value}. Nine weights a channel, then a matrix and a bias; twice."))
    return right("almost all of it is in the two matrices; the depthwise filters cost next to nothing.")


def check_reach(answer: Callable[[int], int]) -> Verdict:
    """02, exercise 2: answer(blocks) is how many input rows above its own a row of a stage's output can see."""
    for blocks in (0, 1, 2, 3):
        value, failed = call(answer, blocks)
        if failed is not None:
            return failed
        convolutions = 1 + 2 * blocks
        if value != -(-convolutions // 2):
            if value == convolutions:
                return wrong(f"with {blocks} blocks it sees {convolutions} rows of the doubled picture. How many of the input are that?")
            if value == convolutions // 2:
                return wrong("half a row more is needed, and a band can only be given whole rows.")
            if value == blocks or value == 2 * blocks:
                return wrong("the upsampling layer convolves, too.")
            return wrong(f"with {blocks} blocks it is not {value}. Count the 3x3 convolutions; each sees one row further, at the doubled size.")
    return right("so two blocks need three rows more at each end, whatever the size of the picture.")


def check_decoder_design(design: DecoderPreset) -> Verdict:
    """02, exercise 3: a decoder of at most 1 M parameters and 100 to 150 GMACs at 128x128, with the paper's changes kept."""
    if not isinstance(design, DecoderPreset):
        return wrong('start from replace(DECODER_PRESETS["paper"], ...).')
    kept = replace(design, channels=(), blocks=())
    if kept != replace(DECODER_PRESETS["paper"], channels=(), blocks=()):
        return wrong("change channels and blocks only.")
    try:
        with torch.device("meta"):
            decoder = TinyDecoder(**asdict(design))
            parameters, macs = count_parameters(decoder) / 1e6, count_macs(decoder, torch.empty(1, 16, 128, 128)) / 1e9
    except (ValueError, TypeError, RuntimeError) as error:
        return wrong(f"this is no decoder: {error}")
    if len(design.channels) != 4:
        return wrong(f"{len(design.channels)} stages make a picture {2 ** (len(design.channels) - 1)} times the latent's size; it takes four for eight times.")
    counted = f"{parameters:.2f} M parameters, {macs:.0f} GMACs"
    if parameters > 1:
        return wrong(f"{counted}: too many parameters. The coarsest stages hold most of them.")
    if not 100 <= macs <= 150:
        return wrong(f"{counted}: too {'many' if macs > 150 else 'few'} MACs. They are mostly in the upsampling layers of the finest stages.")
    return right(f"{counted}.")
