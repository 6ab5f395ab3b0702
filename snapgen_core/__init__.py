"""SnapGen in notebooks: a re-implementation of the CVPR 2025 text-to-image model, with a tiny twin of every part."""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = {"SnapGenPipeline": "pipeline", "SnapGenUNet": "unet", "TinyDecoder": "decoder"}


def load(scale: str = "tiny", stage: str = "distilled", folder=None, decoder: str = "full"):
    """The `SnapGenPipeline` with shipped weights; see `snapgen_core.pipeline.load`."""
    from .pipeline import load as load_pipeline  # here, so that `import snapgen_core` stays light

    return load_pipeline(scale, stage, folder, decoder)


def __getattr__(name: str):
    """The models, imported when first asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
