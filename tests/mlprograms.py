"""Small Core ML packages for tests: built operation by operation, or converted from torch."""

import gc

import numpy as np
import pytest
import torch

from snapgen_core.export.replay import Replay

ct = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402
from coremltools.optimize import coreml as tools  # noqa: E402, F401

IOS17, IOS18 = ct.target.iOS17, ct.target.iOS18
FP16, FP32 = ct.precision.FLOAT16, ct.precision.FLOAT32
TYPES = {np.dtype("float32"): types.fp32, np.dtype("float16"): types.fp16, np.dtype("int32"): types.int32}


@pytest.fixture(autouse=True, scope="module")
def quick_conversion():
    """Every conversion collects garbage; keep it from looking through all that was imported: 0.3 s each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive(*shape, seed=0):
    return np.abs(normal(*shape, seed=seed)) + 0.1


def whole(*shape, low=-5, high=6, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def program(body, arrays, target):
    """body(a, b, ...) builds on inputs like `arrays`. (mb.program wants a function whose arguments have names.)"""
    inputs = [mb.TensorSpec(array.shape, TYPES[array.dtype]) for array in arrays]
    named = [lambda a: body(a), lambda a, b: body(a, b), lambda a, b, c: body(a, b, c)][len(arrays) - 1]
    return mb.program(input_specs=inputs, opset_version=target)(named)


def saved(folder, body, arrays, target=IOS17):
    """A package of the operations just as `body` writes them: without the passes that fold and fuse."""
    model = ct.convert(
        program(body, arrays, target),
        convert_to="mlprogram",
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / "made.mlpackage"
    model.save(str(path))
    return path


def given(arrays):
    return {name: torch.from_numpy(array.copy()) for name, array in zip("abc", arrays)}


def replayed(folder, body, arrays, target=IOS17, precision="fp32"):
    return list(Replay(saved(folder, body, arrays, target), precision)(**given(arrays)).values())


def converted(network, inputs, target, precision, **options):
    """inputs: a tuple of tensors."""
    exported = torch.export.export(network.eval(), inputs).run_decompositions({})
    options |= {"minimum_deployment_target": target, "compute_precision": precision, "skip_model_load": True}
    return ct.convert(exported, convert_to="mlprogram", **options)


def close(found, wanted):
    wanted = wanted if isinstance(wanted, torch.Tensor) else torch.tensor(np.array(wanted))
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)
