"""The training stages, one file each: its models, its loss, its settings."""

from collections.abc import Callable

from ..errors import UserError
from ..train import Stage


def _autoencoder(scale: str, seed: int) -> Stage:
    from .autoencoder import AutoencoderStage

    return AutoencoderStage(scale, seed)


def _text(scale: str, seed: int) -> Stage:
    from .text import TextStage

    return TextStage(scale, seed)


def _detector(scale: str, seed: int) -> Stage:
    from .detector import DetectorStage

    return DetectorStage(scale, seed)


def _base(scale: str, seed: int) -> Stage:
    from .base import BaseStage

    return BaseStage(scale, seed)


def _ablation(scale: str, seed: int) -> Stage:
    from .ablation import AblationStage

    return AblationStage(scale, seed)


# In the order in which they are trained: each builds on those before. A new stage is a new file and one line.
STAGES: dict[str, Callable[[str, int], Stage]] = {"autoencoder": _autoencoder, "text": _text, "detector": _detector, "base": _base, "ablation": _ablation}


def build_stage(name: str, scale: str, seed: int = 0) -> Stage:
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}: choose one of {', '.join(STAGES)}")
    return STAGES[name](scale, seed)
