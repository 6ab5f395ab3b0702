"""What Core ML itself makes of a package: its answers, where it places each operation, and its speed. On macOS only.

`Replay` proves the file on any machine; where an operation runs, and how fast, only Apple's systems can tell.
"""

import platform
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from .replay import coremltools, psnr_db

RUNS = 10  # timed predictions, after one that warms up
ENGINES = {"MLNeuralEngineComputeDevice": "Neural Engine", "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU"}


def available() -> bool:
    return platform.system() == "Darwin"


def measure(path: Path, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict:
    """Core ML's own figures of a package, for the bundle's manifest.

    "predict_db": PSNR of each output against torch's, `expected`; "milliseconds": of one prediction, the median of RUNS;
    "placement": for each engine how many operations Core ML prefers to run there, and their share of the estimated cost.
    """
    ct = coremltools()
    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL)
    given = {name: value.numpy() for name, value in inputs.items()}
    answer = model.predict(given)
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        model.predict(given)
        seconds.append(time.perf_counter() - began)
    return {
        "predict_db": {name: psnr_db(value, torch.from_numpy(answer[name])) for name, value in expected.items()},
        "milliseconds": round(1000 * statistics.median(seconds), 2),
        "placement": placement(model.get_compiled_model_path()),
    }


def placement(compiled: str) -> dict[str, dict[str, float]]:
    """{engine: {"operations": how many, "cost": share in [0, 1]}} by the compute plan of a compiled model (`.mlmodelc`).

    Constants have no place and are not counted.
    """
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(compiled)
    operations, cost = Counter(), Counter()
    for operation in plan.model_structure.program.functions["main"].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is None:
            continue
        engine = ENGINES.get(type(usage.preferred_compute_device).__name__, "elsewhere")
        estimate = plan.get_estimated_cost_for_mlprogram_operation(operation)
        operations[engine] += 1
        cost[engine] += 0.0 if estimate is None else estimate.weight
    return {engine: {"operations": count, "cost": round(cost[engine], 4)} for engine, count in operations.most_common()}


def table(found: dict[str, dict]) -> str:
    """The figures of a bundle's parts, {part: measure(...)}, in lines."""
    lines = [f"{'part':<32}{'ms':>9}{'dB':>7}   operations by engine, on this Mac"]
    for part, figures in found.items():
        places = ", ".join(f"{engine} {place['operations']} ({place['cost']:.0%} of the cost)" for engine, place in figures["placement"].items())
        lines.append(f"{part:<32}{figures['milliseconds']:>9.2f}{min(figures['predict_db'].values()):>7.1f}   {places}")
    return "\n".join(lines)
