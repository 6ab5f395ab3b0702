"""Benchmarks: our networks and their peers side by side in one run, each in a process of its own.

A process a model, so that its peak memory is its own and a model that the system kills takes nothing with it.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .peers import BENCHMARKS, Contender
from .profile import count_macs, count_parameters, peak_memory

ACTIVATIONS_GIB = 3.0  # beside the weights; baseline and SDXL stay below it at 1024 pixels


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, fp32 on a CPU, which is slower in 16 bits unless it has units for them."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the best of ten large matrix products: what this machine can do at most."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a, 10, device)) / 1e9


def timed(call, runs: int, device: torch.device) -> list[float]:
    """Seconds of each of `runs` calls."""
    seconds = []
    for _ in range(runs):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count(contender: Contender) -> tuple[int, int]:
    """(parameters, multiply-accumulates of a forward pass), without making the weights."""
    with torch.device("meta"):
        model = contender.build()
        return count_parameters(model), count_macs(model, **contender.inputs())


def with_random_weights(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with small random weights: far quicker than its own initialisation, and the work is the same."""
    with init_empty_weights():
        model = build()
    noise = torch.empty(2**20, device=device, dtype=dtype).uniform_(-0.02, 0.02)  # again and again: drawing takes long
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weights = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].clone().view(parameter.shape)
            setattr(module, name, nn.Parameter(weights, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device, dtype if buffer.is_floating_point() else None))
    return model.eval()


def _placed(value, device: torch.device, dtype: torch.dtype):
    if isinstance(value, dict):
        return {name: _placed(inner, device, dtype) for name, inner in value.items()}
    return value.to(device, dtype)


def _convolutional(model: nn.Module) -> bool:
    """Whether the memory layout matters: a transformer's one convolution, which makes patches, does not count."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def _arrange(model: nn.Module, layout: str) -> None:
    model.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def _channels_last(value: Tensor | dict):
    return value.to(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value


@torch.no_grad()
def measure(contender: Contender, runs: int) -> dict[str, float | str]:
    """Time and memory of a forward pass at batch 1, in the faster of the two memory layouts."""
    device, dtype = device_and_dtype()
    peak = matmul_peak(device, dtype)
    before = psutil.Process().memory_info().rss / 2**30
    torch.manual_seed(0)
    model = with_random_weights(contender.build, device, dtype)
    inputs = _placed(contender.inputs(), device, dtype)
    if contender.compiled:
        model = torch.compile(model)
    model(**inputs)  # untimed: the first call also fetches memory, which would speak against the first layout
    layouts = {"plain": inputs}
    if not contender.compiled and _convolutional(model):
        layouts["channels_last"] = {name: _channels_last(value) for name, value in inputs.items()}
    warm = {}  # seconds of one call in each layout
    for layout in layouts:
        _arrange(model, layout)
        warm[layout] = timed(lambda: model(**layouts[layout]), 1, device)[0]
    layout = min(warm, key=warm.get)
    _arrange(model, layout)
    seconds = timed(lambda: model(**layouts[layout]), runs, device)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_memory() - before
    return {"seconds": statistics.median(seconds), "slowest": max(seconds), "fastest": min(seconds), "layout": layout, "matmul_gflops": peak, "memory_gib": memory}


def _room_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def run_one(kind: str, name: str, runs: int) -> dict:
    """One line of a benchmark, measured in a new process; {"skipped": why} where it does not fit or does not run."""
    device, dtype = device_and_dtype()
    parameters, macs = count(BENCHMARKS[kind][name])
    line = {"name": name, "title": BENCHMARKS[kind][name].title, "parameters": parameters, "macs": macs}
    needed, room = parameters * dtype.itemsize / 2**30 + ACTIVATIONS_GIB, _room_gib(device)
    if needed > room:
        return line | {"skipped": f"needs about {needed:.0f} GiB of memory, {room:.0f} are free"}
    child = subprocess.run([sys.executable, "-m", __name__, kind, name, str(runs)], capture_output=True, text=True)
    if child.returncode < 0:
        return line | {"skipped": f"ended by the system with signal {-child.returncode}, probably for want of memory"}
    if child.returncode:
        return line | {"skipped": (child.stderr.strip().splitlines() or ["no reason given"])[-1]}
    line |= json.loads(child.stdout.splitlines()[-1])
    gflops = 2 * macs / line["seconds"] / 1e9
    floor = 2 * macs / line["matmul_gflops"] / 1e9
    return line | {"gflops": gflops, "share_of_peak": gflops / line["matmul_gflops"], "floor_seconds": floor}


def run(kind: str, names: list[str], runs: int) -> Iterator[dict]:
    """The lines of benchmark `kind`, as they are measured; ratios to "ours" where that is among those before."""
    ours = None
    for name in names:
        line = run_one(kind, name, runs)
        if name == "ours":
            ours = line
        if ours and "skipped" not in line and "skipped" not in ours:
            line |= {"times_ours": line["seconds"] / ours["seconds"], "memory_times_ours": line["memory_gib"] / ours["memory_gib"]}
        yield line


if __name__ == "__main__":
    print(json.dumps(measure(BENCHMARKS[sys.argv[1]][sys.argv[2]], int(sys.argv[3]))))
