"""Benchmarks: our networks and their peers side by side in one run, each in a process of its own.

A process a model, so that its peak memory is its own and a model that the system kills takes nothing with it.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .decoder import TinyDecoder
from .memory import keep_freed_memory
from .peers import BENCHMARKS, Contender
from .profile import count_macs, count_parameters, peak_memory
from .unet import SnapGenUNet


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


class Forward:
    """A contender's forward pass, called once already: the first call also fetches memory and picks kernels."""

    def __init__(self, contender: Contender, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.model = with_random_weights(contender.build, device, dtype)
        self.inputs = _placed(contender.inputs(), device, dtype)
        # A transformer's one convolution makes patches; our networks turn to channels last by themselves.
        convolutions = sum(isinstance(module, nn.Conv2d) for module in self.model.modules())
        two_layouts = convolutions > 1 and not contender.compiled and not isinstance(self.model, SnapGenUNet | TinyDecoder)
        self.layouts = ("as_built", "channels_last") if two_layouts else ("as_built",)
        if contender.compiled:
            self.model = torch.compile(self.model)
        self()

    def turn_to_channels_last(self) -> None:
        self.model.to(memory_format=torch.channels_last)
        self.inputs = {name: _channels_last(value) for name, value in self.inputs.items()}
        self()

    def __call__(self) -> None:
        self.model(**self.inputs)


def _second(forward: Forward, device: torch.device) -> float:
    """Seconds of the second of two passes: the first one also takes memory and caches back from the other network, which in
    use has no turn."""
    return timed(forward, 2, device)[1]


def _placed(value, device: torch.device, dtype: torch.dtype):
    if isinstance(value, dict):
        return {name: _placed(inner, device, dtype) for name, inner in value.items()}
    return value.to(device, dtype)


def _channels_last(value: Tensor | dict):
    return value.to(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value


@torch.no_grad()
def measure(kind: str, name: str, runs: int) -> dict:
    """Memory of a forward pass at batch 1, and its times: as the model is built, and with channels last where that matters.

    A machine's speed changes from minute to minute. So the network that this one is compared with (`Contender.beside`)
    and a matrix product take turns with it: what happens to one happens to all, and ratios can be trusted.
    """
    keep_freed_memory()  # as `train` and `load` do
    device, dtype = device_and_dtype()
    contender = BENCHMARKS[kind][name]
    before = psutil.Process().memory_info().rss / 2**30
    forward = Forward(contender, device, dtype)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_memory() - before
    beside = Forward(BENCHMARKS[kind][contender.beside], device, dtype) if contender.beside else None
    peaks, layouts = [], {}
    for layout in forward.layouts:
        if layout == "channels_last":
            forward.turn_to_channels_last()
        seconds, beside_seconds = [], []
        for _ in range(runs):
            peaks.append(matmul_peak(device, dtype))
            seconds.append(_second(forward, device))
            if beside:
                beside_seconds.append(_second(beside, device))
        layouts[layout] = {"seconds": seconds, "beside_seconds": beside_seconds}
    return {"memory_gib": memory, "matmul_gflops": max(peaks), "layouts": layouts}


def _room_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def run(kind: str, name: str, runs: int) -> dict:
    """One line of a benchmark, measured in a new process; {"skipped": why} where it does not fit or does not run."""
    device, dtype = device_and_dtype()
    contender = BENCHMARKS[kind][name]
    parameters, macs = count(contender)
    line = {"name": name, "title": contender.title, "beside": contender.beside, "parameters": parameters, "macs": macs}
    both = parameters + (count(BENCHMARKS[kind][contender.beside])[0] if contender.beside else 0)
    needed, room = both * dtype.itemsize / 2**30 + contender.activations_gib, _room_gib(device)
    if needed > room:
        return line | {"skipped": f"needs about {needed:.0f} GiB of memory, {room:.0f} are free"}
    child = subprocess.run([sys.executable, "-m", __name__, kind, name, str(runs)], capture_output=True, text=True)
    if child.returncode < 0:
        return line | {"skipped": f"ended by the system with signal {-child.returncode}, probably for want of memory"}
    if child.returncode:
        return line | {"skipped": (child.stderr.strip().splitlines() or ["no reason given"])[-1]}
    line |= json.loads(child.stdout.splitlines()[-1])
    for times in line["layouts"].values():
        times["median"] = statistics.median(times["seconds"])
        times["gflops"] = 2 * macs / times["median"] / 1e9
        times["share_of_peak"] = times["gflops"] / line["matmul_gflops"]
        ratios = [own / other for own, other in zip(times["seconds"], times["beside_seconds"])]
        if ratios:
            times |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return line | {"floor_seconds": 2 * macs / line["matmul_gflops"] / 1e9}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
