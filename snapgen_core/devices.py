"""Where to compute, and what there is room for."""

import torch


def best_device() -> torch.device:
    """The GPU of this process if there is one, or else the CPU (a Mac's MPS is left out: nothing here was tested on it)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes of data are a small part of what `device` has free, at most a quarter: models come, too."""
    return device.type == "cpu" or 4 * size <= torch.cuda.mem_get_info(device)[0]
