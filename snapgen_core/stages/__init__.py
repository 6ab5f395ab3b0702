"""The training stages, one file each: its models, its loss, its settings."""

from collections.abc import Callable
from dataclasses import replace

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


def _teacher(scale: str, seed: int, **options) -> Stage:
    from .teacher import TeacherStage

    return TeacherStage(scale, seed, **options)


def _kd(scale: str, seed: int, **options) -> Stage:
    from .kd import KdStage

    return KdStage(scale, seed, **options)


def _turbo(scale: str, seed: int) -> Stage:
    from .turbo import TurboStage

    return TurboStage(scale, seed)


def _distilled(scale: str, seed: int, **options) -> Stage:
    from .distilled import DistilledStage

    return DistilledStage(scale, seed, **options)


def _ablation(scale: str, seed: int) -> Stage:
    from .ablation import AblationStage

    return AblationStage(scale, seed)


def _decoder(scale: str, seed: int, **options) -> Stage:
    from .decoder import DecoderStage

    return DecoderStage(scale, seed, **options)


def _decoder_norms(scale: str, seed: int) -> Stage:
    from .decoder_norms import DecoderNormsStage

    return DecoderNormsStage(scale, seed)


def _photo_autoencoder(scale: str, seed: int) -> Stage:
    from .photos import PhotoAutoencoderStage

    return PhotoAutoencoderStage(scale, seed)


def _photo_decoder(scale: str, seed: int) -> Stage:
    from .photos import PhotoDecoderStage

    return PhotoDecoderStage(scale, seed)


# In the order in which they are trained: each builds on those before. A new stage is a new file and one line.
STAGES: dict[str, Callable[..., Stage]] = {
    "autoencoder": _autoencoder,
    "decoder": _decoder,
    "decoder_norms": _decoder_norms,
    "photo_autoencoder": _photo_autoencoder,
    "photo_decoder": _photo_decoder,
    "text": _text,
    "detector": _detector,
    "base": _base,
    "teacher": _teacher,
    "kd": _kd,
    "turbo": _turbo,
    "distilled": _distilled,
    "ablation": _ablation,
}
OPTIONS = {"decoder": ("data", "perceptual"), "teacher": ("scenes",), "kd": ("teacher", "constant", "student", "mislabel", "stored", "t5"), "distilled": ("teacher", "only", "t5")}  # what a stage takes beside these two


def build_stage(name: str, scale: str, seed: int = 0, batch: int | None = None, rate: float | None = None, **options) -> Stage:
    """The stage `name`, with another batch size or learning rate than its own if these are given; options that are None
    count as not given. Raises UserError for an unknown stage, or for options that it does not take."""
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}: choose one of {', '.join(STAGES)}")
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in OPTIONS.get(name, ()):
            takers = [stage for stage, keys in OPTIONS.items() if key in keys]
            raise UserError(f"stage {name} takes no --{key}, only {', '.join(takers)} does")
    stage = STAGES[name](scale, seed, **options)
    if batch is not None:
        stage.settings, stage.options = replace(stage.settings, batch_size=batch), stage.options | {"batch": str(batch)}
    if rate is not None:
        stage.settings, stage.options = replace(stage.settings, learning_rate=rate), stage.options | {"rate": f"{rate:g}"}
    return stage
