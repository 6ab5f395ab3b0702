"""SnapGen in notebooks: a re-implementation of the CVPR 2025 text-to-image model, with a tiny twin of every part."""

__version__ = "0.1.0"


def load(scale: str = "tiny", stage: str = "base", folder=None):
    """The `SnapGenPipeline` with shipped weights; see `snapgen_core.pipeline.load`."""
    from .pipeline import load as load_pipeline  # here, so that `import snapgen_core` stays light

    return load_pipeline(scale, stage, folder)


def __getattr__(name: str):
    """`snapgen_core.SnapGenPipeline` and `snapgen_core.SnapGenUNet`, imported when first asked for."""
    if name == "SnapGenPipeline":
        from .pipeline import SnapGenPipeline

        return SnapGenPipeline
    if name == "SnapGenUNet":
        from .unet import SnapGenUNet

        return SnapGenUNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
