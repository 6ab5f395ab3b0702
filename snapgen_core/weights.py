"""What is done to weights whatever model they belong to: loaded and checked, told apart, saved for shipping."""

import copy
import hashlib
import json
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from .errors import UserError, reason


def load_model(kind: type[ModelMixin], place: str | Path, what: str, dtype: torch.dtype = torch.float32, **settings) -> ModelMixin:
    """A diffusers model of class `kind` from safetensors, in `dtype`; `settings` go to its `from_pretrained`.

    Raises:
        UserError: `what` is missing, damaged, or holds weights of another model.
    """
    # In fp32 without low_cpu_mem_usage, so that diffusers tells all that does not fit and does not stop at the first tensor.
    # In 16 bits with it, or it would first make the whole model in fp32, 32 GB for SD3.5-Large.
    sparing = dtype != torch.float32
    try:
        model, report = kind.from_pretrained(place, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=sparing, output_loading_info=True, **settings)
    except Exception as error:  # the hub, safetensors, json and diffusers raise many kinds: to the user they are all this
        raise UserError(f"cannot load {what}: {reason(error)}") from None
    strange = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if strange:
        raise UserError(f"cannot load {what}: its weights are another model's, {len(strange)} tensors do not fit, {strange[0]} first")
    return model.eval()


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
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)  # where it was loaded from is a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
