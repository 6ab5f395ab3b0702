"""The state of a run on disk: weights, their average, the optimiser's moments and the step, written whole or not at all."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError, reason
from ..files import atomic_folder, write_json


class Ema:
    """Exponential moving average of a module's floating-point state; other buffers are copied."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        """Blend in the weights after step number `step`; early on the average is shorter, or it would keep the
        random initial weights for a thousand steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.state[name])
                values.append(tensor.detach())
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averages, values, 1 - decay)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """AdamW's moments under their parameters' names (safetensors holds flat tensors, no pickled state)."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {f"optimizer.{names[p]}.{key}": value.contiguous() for p, state in optimizer.state.items() for key, value in state.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in state.items()}


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the parameter's device and, if it is a moment, in its memory layout: the fused step walks through
    parameter, gradient and moments in the order of memory, and channels_last is another one than safetensors'."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().contiguous() for name, tensor in state.items()}


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_checkpoint(run_dir: Path, step: int, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    """Write `run_dir/checkpoints/step-N` whole or not at all, then drop all but the newest two."""
    tensors = {
        **_with_prefix("model.", module.state_dict()),
        **_with_prefix("ema.", ema.state),
        **_optimizer_tensors(optimizer, module),
    }
    with atomic_folder(run_dir / "checkpoints" / f"step-{step:08d}") as folder:
        save_file(tensors, folder / "state.safetensors")
        write_json(folder / "state.json", {"step": step, **facts})
    for old in checkpoints(run_dir)[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-????????"))


def load_checkpoint(run_dir: Path, identity: dict) -> tuple[dict[str, Tensor], dict] | None:
    """Newest checkpoint of `run_dir` as (tensors, facts), or None; a checkpoint of another run is refused."""
    found = checkpoints(run_dir)
    if not found:
        return None
    try:
        facts = json.loads((found[-1] / "state.json").read_text("utf-8"))
        tensors = load_file(found[-1] / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {found[-1]}: {reason(error)}; remove that folder to resume from the one before") from None
    for key in {**facts["identity"], **identity}:
        held, asked = (one.get(key, "left out") for one in (facts["identity"], identity))
        if held != asked:
            raise UserError(f"{run_dir} holds a run with {key} {held}, not {asked}: choose another --run-dir")
    return tensors, facts


def restore(run_dir: Path, resumed: tuple[dict[str, Tensor], dict], module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put a checkpoint's tensors in place and return its (step, minutes)."""
    tensors, facts = resumed
    try:
        module.load_state_dict(_without_prefix("model.", tensors))
    except RuntimeError as error:
        raise UserError(f"{run_dir} holds a run of another model: {reason(error)}; choose another --run-dir") from None
    for name, average in _without_prefix("ema.", tensors).items():
        ema.state[name].copy_(average)
    _restore_optimizer(optimizer, module, tensors)
    return facts["step"], facts["minutes"]
