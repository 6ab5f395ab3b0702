"""The one training loop: accelerate, EMA, JSONL log, atomic checkpoints, exact resume.

The loop knows no stage. A stage brings a module whose forward returns its loss, and batches that are a pure function
of (seed, step): all randomness (noise, timesteps, dropout of encoders) is drawn there. So weights, EMA, optimiser
moments and the step number are the whole state, and on a CPU a run resumed by its own command ends with the same bits as
an uninterrupted one (many of a GPU's kernels do not add in a fixed order). With more steps than it began with, a run that
has cooled down is warmed again.
"""

import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..files import append_jsonl, atomic_folder, atomic_write, git_commit, write_json
from ..memory import keep_freed_memory
from ..paths import checkpoint_dir
from .checkpoints import Ema, load_checkpoint, restore, save_checkpoint
from .records import loss_curve, shipped_origin, trim_log
from .stage import Stage, TrainSettings


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


def train(stage: Stage, run_dir: Path, steps: int | None = None, minutes: float | None = None, save_every: float = 120.0, progress: bool = True, warm_start: bool = False, compile: bool = False, score: bool = True) -> Path:
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
        score: score the final weights, which can take minutes.

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
    settings, bare = stage.settings, stage.module
    parallel = DistributedDataParallelKwargs(find_unused_parameters=settings.turns)
    accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no", kwargs_handlers=[parallel])
    rank, world = accelerator.process_index, accelerator.num_processes
    identity = {"stage": stage.name, "scale": stage.scale, "seed": stage.seed, "world": world, "batch_size": settings.batch_size, **stage.options}
    if settings.batch_size % world:
        raise UserError(f"a batch of {settings.batch_size} cannot be shared by {world} processes: give --batch a multiple of {world}")
    total = steps if steps is not None else (10**9 if minutes is not None else settings.steps)

    resumed = load_checkpoint(run_dir, identity)
    if resumed[1]["origin"] if resumed else warm_start:
        stage.load(checkpoint_dir(stage.scale))  # also before a resume: a warm stage may keep parts of it frozen
    origin = resumed[1]["origin"] if resumed else shipped_origin(stage) if warm_start else None
    with accelerator.main_process_first():  # one process fills the caches, the others find them
        stage.prepare()

    bare.to(accelerator.device).train()
    if compile:
        bare.compile()
    optimizer = torch.optim.AdamW(_groups(bare, settings), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
    ema = Ema(bare, settings.ema_decay)
    start, trained_minutes = restore(run_dir, resumed, bare, ema, optimizer) if resumed else (0, 0.0)
    if accelerator.is_main_process:
        trim_log(run_dir / "log.jsonl", start)

    module, optimizer = accelerator.prepare(bare, optimizer)
    watch = getattr(stage, "watch", lambda run_dir, step, average: None)
    step, began, saved = start, time.monotonic(), time.monotonic()
    bar = tqdm(total=total if total < 10**9 else None, initial=start, desc=f"{stage.name} ({stage.scale})", unit="step", dynamic_ncols=True, disable=not (progress and accelerator.is_main_process))

    def checkpoint() -> None:
        nonlocal saved
        if accelerator.is_main_process:
            facts = {"identity": identity, "minutes": trained_minutes + (time.monotonic() - began) / 60, "settings": asdict(settings), "origin": origin}
            save_checkpoint(run_dir, step, bare, ema, optimizer.optimizer, facts)
            watch(run_dir, step, ema.state)
        saved = time.monotonic()

    if step == 0 and accelerator.is_main_process:
        watch(run_dir, step, ema.state)
    stop = interrupted = False
    with _stop_signals() as stopped, bar:
        while step < total and not stop:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * settings.share_of_rate(step, total)
            batch = stage.batch(step, rank, world)
            with accelerator.autocast():
                loss, figures = module(**{key: value.to(accelerator.device) for key, value in batch.items()})
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(module.parameters(), math.inf if settings.clip_norm is None else settings.clip_norm)
            figures = {"loss": loss, **figures, "grad_norm": norm}
            figures = {name: value.item() for name, value in figures.items()}  # read last: on a GPU that waits for the device
            seconds = time.monotonic() - began
            broken = not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]))
            late = minutes is not None and seconds >= 60 * minutes
            broken, interrupted, late = _in_any_process(accelerator, broken, bool(stopped), late)
            stop = interrupted or late
            if broken:
                wrong = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)) or "another process has"
                raise UserError(f"not finite at step {step + 1}: {wrong}; training stopped, the last good checkpoint in {run_dir} is kept")
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
    if interrupted:
        raise KeyboardInterrupt(f"stopped after step {step}; the same command resumes from {run_dir}")
    spent = trained_minutes + (time.monotonic() - began) / 60
    budget = f"--minutes {spent:.2f}" if settings.cooldown and total == 10**9 else f"--steps {step}"  # by the clock nothing cools down
    return _finish(stage, run_dir, ema, accelerator, step, spent, budget, origin, compile, score)


def _groups(module: nn.Module, settings: TrainSettings) -> list[dict]:
    """The trained parameters, a group for each learning rate. One without a gradient in a step (the other player's turn, in
    an adversarial stage) is left as it is, moments included: one AdamW so serves as an optimiser for each player."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for beginning, rate in settings.rates if name.startswith(beginning)), settings.learning_rate)
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]


def _in_any_process(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Each flag, true if it is so in any process: all of them have to leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flags
    everyone = accelerator.gather(torch.tensor([flags], dtype=torch.int32, device=accelerator.device))  # [processes, flags]
    return tuple(bool(flag) for flag in everyone.amax(dim=0))


def _finish(stage: Stage, run_dir: Path, ema: Ema, accelerator: Accelerator, step: int, minutes: float, budget: str, origin: dict | None, compiled: bool, score: bool) -> Path:
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
            "command": f"snapgen train {stage.name} --scale {stage.scale} --seed {stage.seed} {budget}" + "".join(f" --{name} {shlex.quote(value)}" for name, value in stage.options.items()) + " --warm-start" * bool(origin) + " --compile" * compiled,
            "commit": git_commit(),
            "steps": step,
            "samples": step * stage.settings.batch_size,
            "minutes": round(minutes, 1),
            "device": _device_name(accelerator.device),
            "scores": stage.score() if score else {},
            "losses": loss_curve(run_dir / "log.jsonl"),
            "origin": origin,
        }
        write_json(run_dir / "result.json", result)
    accelerator.wait_for_everyone()
    return path


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
