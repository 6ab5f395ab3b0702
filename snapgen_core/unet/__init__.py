"""The efficient denoiser of Sec. 3.1: attention, blocks, network."""

from .network import SnapGenUNet, SnapGenUNetOutput

__all__ = ["SnapGenUNet", "SnapGenUNetOutput"]
