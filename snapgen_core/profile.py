"""What a network costs: parameters and multiply-accumulates; and what a run did: time and memory."""

import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_parameters(module: nn.Module) -> int:
    """Trainable or not, each tensor once. Works on meta tensors."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *args, **kwargs) -> int:
    """Multiply-accumulates of one call `module(*args, **kwargs)`, which the paper's tables call FLOPs.

    Counts convolutions, linear layers and the two products of attention; norms, activations and other element-wise
    work are left out. Runs one forward pass without gradients: build module and inputs under `torch.device("meta")`,
    and it costs neither time nor memory. (Shortcuts that a model takes on a CPU, as `TinyDecoder` does, are not taken
    there: what is counted is what the paper counts.)
    """
    return macs_by_module(module, *args, **kwargs)[""]


def macs_by_module(module: nn.Module, *args, **kwargs) -> dict[str, int]:
    """As `count_macs`, for each submodule by its name in `named_modules`; "" is the whole. Without any MACs: left out."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        module(*args, **kwargs)
    root = type(module).__name__
    counted = {name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items() if name != "Global"}
    return counted | {"": counter.get_total_flops() // 2}


def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# torch's counter knows the attention kernels of GPUs, and on meta tensors the plain products, but not this one.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def peak_memory() -> float:
    """The most memory that this process has held so far, in GiB."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    if sys.platform == "linux":  # `getrusage` would begin with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def cost(started: float) -> str:
    """What was spent since `started` (`time.perf_counter()`), in a line for the end of a notebook."""
    minutes, threads = (time.perf_counter() - started) / 60, torch.get_num_threads()
    return f"this run took {minutes:.1f} minutes and at most {peak_memory():.1f} GB of memory, with {threads} thread{'s' * (threads != 1)}"
