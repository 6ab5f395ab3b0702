"""Core ML's own figures. Where there is no Mac, coremltools' classes are played by stand-ins that keep to its documentation."""

from dataclasses import make_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from snapgen_core.export import macos

pytest.importorskip("coremltools")

ENGINE, CPU = (type(name, (), {}) for name in ("MLNeuralEngineComputeDevice", "MLCPUComputeDevice"))
Operation = make_dataclass("Operation", ["device", "weight"])
OPERATIONS = [Operation(None, None), Operation(ENGINE, 0.7), Operation(ENGINE, 0.2), Operation(CPU, 0.1), Operation(CPU, None)]


class Plan:
    def __init__(self):
        block = SimpleNamespace(operations=OPERATIONS)
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions={"main": SimpleNamespace(block=block)}))

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        return operation.device and SimpleNamespace(preferred_compute_device=operation.device())

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        return operation.weight and SimpleNamespace(weight=operation.weight)


@pytest.fixture
def mac(monkeypatch):
    """A Mac on which every package answers twice its input."""
    from coremltools.models import MLModel, compute_plan

    calls = []

    class Model:
        def __init__(self, path, compute_units):
            self.path = path

        def predict(self, given):
            calls.append(given)
            return {"image": 2 * given["z"]}

        def get_compiled_model_path(self):
            return f"{self.path}c"

    monkeypatch.setattr("coremltools.models.MLModel", Model)
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", lambda path: {"made.mlpackagec": Plan()}[path])
    assert hasattr(MLModel, "predict") and hasattr(MLModel, "get_compiled_model_path")  # what the stand-in stands for
    return calls


def test_answers_speed_and_places(mac):
    z = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    found = macos.measure("made.mlpackage", {"z": z}, {"image": 2 * z + 0.02})
    assert found["placement"] == {"Neural Engine": {"operations": 2, "cost": 0.9}, "CPU": {"operations": 2, "cost": 0.1}}
    assert len(mac) == 1 + macos.RUNS and all(isinstance(given["z"], np.ndarray) for given in mac)
    assert found["predict_db"]["image"] == pytest.approx(20 * np.log10(4 / 0.02), abs=0.1) and found["milliseconds"] >= 0
    assert "Neural Engine 2 (90% of the cost), CPU 2 (10% of the cost)" in macos.table({"VAEDecoder": found})


@pytest.mark.skipif(not macos.available(), reason="Core ML runs on macOS only")
def test_core_ml_computes_what_torch_does(tmp_path):
    from snapgen_core import load
    from snapgen_core.export import coreml, verify
    from snapgen_core.export.parts import parts

    pipe = load("tiny", "base", decoder="tiny")
    decoder = next(part for part in parts(pipe, guided=True) if part.name == "VAEDecoder")
    path = tmp_path / "VAEDecoder.mlpackage"
    coreml.convert(decoder, "iOS17").save(str(path))
    inputs = verify.realistic(decoder, pipe, "a red car")
    found = macos.measure(path, inputs, {"image": decoder.module(**inputs)})
    assert found["predict_db"]["image"] > 35 and sum(place["operations"] for place in found["placement"].values())
