"""The one training loop: accelerate, EMA, JSONL log, atomic checkpoints, exact resume.

The loop knows no stage. A stage brings a module whose forward returns its loss, and batches that are a pure function
of (seed, step): all randomness (noise, timesteps, dropout of encoders) is drawn there. So weights, EMA, optimiser
moments and the step number are the whole state, and on a CPU a resumed run ends with the same bits as an
uninterrupted one (many of a GPU's kernels do not add in a fixed order).
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UserError, reason
from .files import append_jsonl, atomic_folder, atomic_write, git_commit, write_json
from .memory import keep_freed_memory
from .paths import checkpoint_dir


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs to know. Betas and weight decay follow Supplement G. Ours are: the learning rate, set per stage
    (the paper's 5e-5 belongs to a total batch of 1024 and a long run), and with higher rates than the paper's a warm-up
    and clipped gradients; Supplement G names neither, nor a decay of the average."""

    batch_size: int  # over all processes
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float | None = 1.0  # None: gradients are left as they are
    warmup_steps: int = 100
    steps: int = 10_000  # the whole stage, where no budget is given


class Stage(Protocol):
    """What the loop needs of a stage (`snapgen_core.stages` holds one file each)."""

    name: str
    scale: str
    seed: int
    settings: TrainSettings
    options: dict[str, str]  # of `snapgen train`, beside seed and scale, that decide on the batches: {"data": FOLDER}
    module: nn.Module  # all that is trained; forward(**batch) returns (loss, {figure: scalar tensor})

    def prepare(self) -> None:
        """Make or load what `batch` reads; called once, before the clock starts."""

    def batch(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        """This process's share of batch number `step`; a pure function of (seed, step, rank, world)."""

    def score(self) -> dict[str, float]:
        """Figures for the card, with the weights now in `module`."""

    def save(self, root: Path) -> list[Path]:
        """Write the shipped layout below `root` and return the folders written."""

    def load(self, root: Path) -> None:
        """The inverse of `save`, for a warm start. Raises UserError where the shipped weights are not all of them."""


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The generator of everything random in one step."""
    mixed = (seed * 1_000_003 + step) * 4_099 + rank
    return torch.Generator().manual_seed(mixed % 2**63)


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


# ------------------------------------------------------------------------------------------------- checkpoints


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
    for old in _checkpoints(run_dir)[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-????????"))


def load_checkpoint(run_dir: Path, identity: dict) -> tuple[dict[str, Tensor], dict] | None:
    """Newest checkpoint of `run_dir` as (tensors, facts), or None; a checkpoint of another run is refused."""
    found = _checkpoints(run_dir)
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


# ------------------------------------------------------------------------------------------------- the loop


@contextmanager
def _stop_signals():
    """Turn SIGTERM and SIGINT into a flag, so that the step in progress ends and a checkpoint is written. Who asks twice
    is not made to wait."""
    received = []

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            handlers[number] = signal.signal(number, receive)
        except ValueError:  # not in the main thread (a notebook's executor): then the kernel handles signals
            break
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(stage: Stage, run_dir: Path, steps: int | None = None, minutes: float | None = None, save_every: float = 120.0, progress: bool = True, warm_start: bool = False, compile: bool = False) -> Path:
    """Train `stage` in `run_dir`, resuming what is there, and return the path of the final EMA weights.

    `run_dir` then holds `model.safetensors` (the module's EMA weights), `weights/` (the same as each model is shipped
    and loaded), `log.jsonl`, `result.json` and the newest two `checkpoints/`.

    Args:
        steps: total steps of the run, those before a resume included (default: the stage's own).
        minutes: stop after this time in this call, whatever the step.
        save_every: seconds between checkpoints.
        warm_start: begin with the shipped weights and a fresh optimiser; a run that resumes ignores it.
        compile: let torch.compile fuse the module's kernels. Sums are then added in another order: what follows is the same
            run only as far as rounding goes.

    Raises:
        UserError: there is no compiler, the folder holds another run, or loss or gradient is no longer finite (the last checkpoint is kept).
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint of the step then in progress was written.
    """
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # what torch looks for
    if compile and shutil.which(compiler) is None:
        raise UserError(f"torch compiles with {compiler}, and there is none here: install it, or leave out --compile")
    run_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    gpu = torch.cuda.is_available()
    # Left to itself accelerate ignores torchrun on CPUs, and takes a Mac's MPS, on which this loop is not tested.
    accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
    rank, world, settings, bare = accelerator.process_index, accelerator.num_processes, stage.settings, stage.module
    identity = {"stage": stage.name, "scale": stage.scale, "seed": stage.seed, "world": world, "batch_size": settings.batch_size, **stage.options}
    total = steps if steps is not None else (10**9 if minutes is not None else settings.steps)

    resumed = load_checkpoint(run_dir, identity)
    if resumed[1]["origin"] if resumed else warm_start:
        stage.load(checkpoint_dir(stage.scale))  # also before a resume: a warm stage may keep parts of it frozen
    origin = resumed[1]["origin"] if resumed else _shipped_origin(stage) if warm_start else None
    with accelerator.main_process_first():  # one process fills the caches, the others find them
        stage.prepare()

    bare.to(accelerator.device).train()
    if compile:
        bare.compile()
    optimizer = torch.optim.AdamW((p for p in bare.parameters() if p.requires_grad), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
    ema = Ema(bare, settings.ema_decay)
    start, trained_minutes = _resume(run_dir, resumed, bare, ema, optimizer) if resumed else (0, 0.0)
    if accelerator.is_main_process:
        _trim_log(run_dir / "log.jsonl", start)

    module, optimizer = accelerator.prepare(bare, optimizer)
    step, began, saved = start, time.monotonic(), time.monotonic()
    bar = tqdm(total=total if total < 10**9 else None, initial=start, desc=f"{stage.name} ({stage.scale})", unit="step", dynamic_ncols=True, disable=not (progress and accelerator.is_main_process))

    def checkpoint() -> None:
        nonlocal saved
        if accelerator.is_main_process:
            facts = {"identity": identity, "minutes": trained_minutes + (time.monotonic() - began) / 60, "settings": asdict(settings), "origin": origin}
            save_checkpoint(run_dir, step, bare, ema, optimizer.optimizer, facts)
        saved = time.monotonic()

    stop = False
    with _stop_signals() as stopped, bar:
        while step < total and not stop:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
            batch = stage.batch(step, rank, world)
            with accelerator.autocast():
                loss, figures = module(**{key: value.to(accelerator.device) for key, value in batch.items()})
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(module.parameters(), math.inf if settings.clip_norm is None else settings.clip_norm)
            figures = {"loss": loss, **figures, "grad_norm": norm}
            figures = {name: value.item() for name, value in figures.items()}  # read last: on a GPU that waits for the device
            seconds = time.monotonic() - began
            broken = not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]))
            broken, stop = _in_any_process(accelerator, broken, bool(stopped) or (minutes is not None and seconds >= 60 * minutes))
            if broken:
                raise UserError(f"the loss is {figures['loss']} at step {step + 1} and its gradient {figures['grad_norm']}: training stopped; the last good checkpoint in {run_dir} is kept")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            ema.update(bare, step)
            rate = (step - start) * settings.batch_size / max(seconds, 1e-9)
            bar.set_postfix_str(f"loss {figures['loss']:.4f}, {rate:.0f} samples/s")
            bar.update()
            if accelerator.is_main_process:
                append_jsonl(run_dir / "log.jsonl", {"step": step, **figures, "seconds": round(trained_minutes * 60 + seconds, 2)})
            if time.monotonic() - saved >= save_every:
                checkpoint()
    checkpoint()
    if stopped:
        raise KeyboardInterrupt(f"stopped after step {step}; the same command resumes from {run_dir}")
    return _finish(stage, run_dir, ema, accelerator, step, trained_minutes + (time.monotonic() - began) / 60, origin, compile)


def _in_any_process(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Each flag, true if it is so in any process: all of them have to leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flags
    everyone = accelerator.gather(torch.tensor([flags], dtype=torch.int32, device=accelerator.device))  # [processes, flags]
    return tuple(bool(flag) for flag in everyone.amax(dim=0))


def _resume(run_dir: Path, resumed: tuple[dict[str, Tensor], dict], module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
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


def _shipped_origin(stage: Stage) -> dict:
    """How the shipped weights were made."""
    path = checkpoint_dir(stage.scale) / stage.name / "training.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"nothing to start warm from: no readable {path}") from None


def trained_steps(folder: Path) -> int:
    """Steps of all trainings that led to the shipped weights in `folder`; 0 where nothing tells."""
    path, steps = folder / "training.json", 0
    run = json.loads(path.read_text("utf-8")) if path.exists() else None
    while run:
        steps, run = steps + run["steps"], run["origin"]
    return steps


def _trim_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`: they were written between the last checkpoint and the kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the kill cut this line short
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), "utf-8")


def _finish(stage: Stage, run_dir: Path, ema: Ema, accelerator: Accelerator, step: int, minutes: float, origin: dict | None, compiled: bool) -> Path:
    """Put the EMA weights into the module, write DIR/model.safetensors and DIR/weights, score them into DIR/result.json."""
    path = run_dir / "model.safetensors"
    stage.module.load_state_dict(ema.state)
    stage.module.eval()
    if accelerator.is_main_process:
        with atomic_write(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in ema.state.items()}, temporary)
        with atomic_folder(run_dir / "weights") as folder:
            stage.save(folder)
        result = {
            "stage": stage.name,
            "scale": stage.scale,
            "seed": stage.seed,
            "command": f"snapgen train {stage.name} --scale {stage.scale} --seed {stage.seed} --steps {step}" + "".join(f" --{name} {shlex.quote(value)}" for name, value in stage.options.items()) + " --warm-start" * bool(origin) + " --compile" * compiled,
            "commit": git_commit(),
            "steps": step,
            "samples": step * stage.settings.batch_size,
            "minutes": round(minutes, 1),
            "device": _device_name(accelerator.device),
            "scores": stage.score(),
            "losses": _loss_curve(run_dir / "log.jsonl"),
            "origin": origin,
        }
        write_json(run_dir / "result.json", result)
    accelerator.wait_for_everyone()
    return path


def _loss_curve(log: Path, points: int = 20) -> list[float]:
    """The run in brief: the mean loss of each of (at most) `points` equal stretches of it; the task's, where it is logged."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    losses = torch.tensor([line.get("task", line["loss"]) for line in lines], dtype=torch.float64)
    return [round(part.mean().item(), 5) for part in losses.tensor_split(min(points, len(losses)))]


def history(result: dict) -> list[tuple[float, float]]:
    """How shipped weights came to be: (samples seen, mean loss there) through all trainings that led to `result`, the
    content of a checkpoint's `training.json`."""
    runs, curve, before = [result], [], 0
    while runs[0]["origin"]:
        runs.insert(0, runs[0]["origin"])
    for run in runs:
        losses = run.get("losses", [])
        curve += [(before + (i + 0.5) * run["samples"] / len(losses), loss) for i, loss in enumerate(losses)]
        before += run["samples"]
    return curve


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def ship(run_dir: Path) -> list[Path]:
    """Put a finished run's weights, each folder with a card, into data/checkpoints/<scale>; returns the folders."""
    result = json.loads((run_dir / "result.json").read_text("utf-8"))
    shipped = []
    for folder in sorted((run_dir / "weights").iterdir()):
        target = checkpoint_dir(result["scale"]) / folder.name
        with atomic_folder(target) as part:
            shutil.copytree(folder, part, dirs_exist_ok=True)
            write_json(part / "training.json", result)
            (part / "CARD.md").write_text(card(folder.name, result), "utf-8")
        shipped.append(target)
    return shipped


def card(title: str, result: dict) -> str:
    """A checkpoint's card: how it was made and what it scores; `training.json` beside it says the same to programs."""
    keys = ("command", "commit", "seed", "steps", "samples", "minutes", "device")
    lines = [f"# {title} ({result['scale']})", "", "| made by | |", "|---|---|", *(f"| {key} | `{result[key]}` |" for key in keys)]
    origin = result["origin"]
    while origin:
        lines.append(f"| before that | `{origin['command']}`, {origin['samples']} samples, {origin['minutes']} minutes, {origin['device']} |")
        origin = origin["origin"]
    lines += ["", "| scores | |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in result["scores"].items()), ""]
    return "\n".join(lines)
