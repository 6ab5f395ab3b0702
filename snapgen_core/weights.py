"""What is done to weights whatever model they belong to: checked after loading, told apart, saved for shipping."""

import copy
import hashlib
from pathlib import Path

import torch
from torch import nn

from .errors import UserError


def check_loaded(report: dict, place: object) -> None:
    """Refuse weights that do not fit their model exactly; `report` is from_pretrained's loading info."""
    strange = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if strange:
        raise UserError(f"{place} holds weights of another model: {len(strange)} tensors do not fit, {strange[0]} first")


def weights_digest(module: nn.Module) -> str:
    """Hex digest of a module's state: names, types, shapes and values. Caches are named by it."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_half(model: nn.Module, folder: Path) -> None:
    """Ship a diffusers or transformers model in fp16; `model` itself stays as it is. Safetensors holds no other memory
    layout than the plain one, and training may use channels_last."""
    copy.deepcopy(model).half().to(memory_format=torch.contiguous_format).save_pretrained(folder)
