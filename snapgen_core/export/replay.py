"""Runs a saved Core ML package (`.mlpackage`, an mlprogram) with torch, on any machine.

Apple's runtime exists on Apple's systems only, and so does `predict` of coremltools. But a package holds the whole
program: its operations, in order, and its weights. `Replay` reads them back and executes one after the other. It proves
the file: what conversion, precision and palettization made of a network, down to the operation that changed it. It does
not prove an engine: a phone adds its own way of rounding, and its speed is not to be seen here.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, reason
from .operations import OPERATIONS, SILENT

# What the values of MIL's types are held in. torch computes little with the larger unsigned integers: those take the
# next signed type. Numbers of fewer than 8 bits are weights only, and take a byte each.
DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "int4": torch.int8,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
}


class Port(NamedTuple):
    """An input or an output, as the package declares it. None in the shape: any size."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Variable:
    """The value that an input or an earlier operation has under this name. (All others are constants, kept as they are.)"""

    name: str


@dataclass(frozen=True)
class Step:
    """An operation: `arguments` are variables, constants (tensors and strings) or tuples of both."""

    op_type: str
    name: str
    arguments: dict[str, Any]
    outputs: dict[str, Port]
    last_used: tuple[str, ...]  # variables that nothing after this step asks for


class Replay:
    """A package's program, ready to run.

    path: the `.mlpackage` folder. precision: "fp32" computes and keeps every float in fp32, whatever the package says:
    what is left of the difference to the network is the conversion's (and the weights', where those are stored in
    fewer bits). "fp16" follows the package: where it declares a variable as fp16, the value is rounded to fp16, and
    overflows to infinity. Inside an operation sums are still carried in fp32 and rounded once at its end, as engines
    with wide accumulators do; one that accumulates in fp16, or keeps fp32 between operations that it fuses, differs.

    `inputs` and `outputs` map names to `Port(shape, dtype)`. With precision "fp32" float outputs come as fp32, whatever
    dtype is declared.

    Raises UserError where coremltools is missing, the package is missing, damaged or no mlprogram, or where it has an
    operation that is not known here.
    """

    def __init__(self, path: str | Path, precision: str = "fp32"):
        if precision not in ("fp16", "fp32"):
            raise UserError(f"precision {precision!r}: fp16 or fp32")
        self.path, self.precision = Path(path), precision
        function = load_function(self.path)
        self.inputs = {name: _port(variable) for name, variable in function.inputs.items()}
        self.outputs = {variable.name: _port(variable) for variable in function.outputs}
        self._results = {variable.name: _argument(variable) for variable in function.outputs}
        self._steps = _steps([op for op in function.operations if op.op_type != "const"], keep=self._results.values())

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the program: tensors by the names in `inputs`, any float or integer dtype -> tensors by those in `outputs`.

        Raises UserError where an input is missing, unknown, of the wrong shape, or has floats where integers are asked
        for, and where an operation fails on the values (an index out of range).
        """
        values = self._admit(inputs)
        for step in self._steps:
            self._run(step, values)
        return {name: self._kept(_look_up(result, values), self.outputs[name].dtype) for name, result in self._results.items()}

    def trace(self, **inputs: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """As a call, but yield (name, operation's type, tensor) for every output of every operation, in order.

        The name is the output's, which is the operation's own where it has one output. Decompressed weights
        (`constexpr_...`) are yielded too, plain constants are not. A tensor is let go after its last use: keep what
        you need, and change nothing in place.
        """
        return self._trace(self._admit(inputs))

    def _trace(self, values: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        for step in self._steps:
            for name, value in self._run(step, values).items():
                yield name, step.op_type, value

    def _admit(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if inputs.keys() != self.inputs.keys():
            raise UserError(f"{self.path} takes the inputs {', '.join(self.inputs)}, not {', '.join(inputs) or 'none'}")
        values = {}
        for name, port in self.inputs.items():
            x = torch.as_tensor(inputs[name]).detach().cpu()
            if not _fits(x, port):
                wanted = tuple("any" if size is None else size for size in port.shape)
                raise UserError(f"{self.path}: input {name} has shape {wanted}, not {tuple(x.shape)}")
            if x.is_floating_point() and not port.dtype.is_floating_point:
                raise UserError(f"{self.path}: input {name} takes integers ({port.dtype}), not {x.dtype}")
            values[name] = self._kept(x, port.dtype)
        return values

    @torch.no_grad()
    def _run(self, step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute a step's outputs, note them in `values`, and drop from there what was used for the last time."""
        arguments = {name: _computable(_look_up(argument, values)) for name, argument in step.arguments.items()}
        try:
            found = OPERATIONS[step.op_type](**arguments)
        except Exception as error:
            raise UserError(f"{self.path}: operation {step.name} ({step.op_type}) failed: {reason(error)}") from error
        found = found if isinstance(found, tuple) else (found,)
        outputs = {}
        for (name, port), value in zip(step.outputs.items(), found, strict=True):
            if not _fits(value, port):
                shapes = f"shape {tuple(value.shape)}, where the package declares {port.shape}"
                raise UserError(f"{self.path}: operation {step.name} ({step.op_type}) gave {shapes}")
            outputs[name] = self._kept(value, port.dtype)
        values |= outputs
        for name in step.last_used:
            del values[name]
        return outputs

    def _kept(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(torch.float32 if dtype.is_floating_point and self.precision == "fp32" else dtype)


# --------------------------------------------------------------------------------------------------- reading a package


def coremltools():
    """The package, without the page of warnings with which it greets a machine without Apple's runtime, and every torch newer
    than itself. Raises UserError where it is missing."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import coremltools as library
    except ImportError as error:
        raise UserError(f'Core ML packages need coremltools: pip install "snapgen_core[export]" ({reason(error)})') from None
    finally:
        logger.setLevel(level)
    return library


def load_function(path: Path):
    """The program's main function, as coremltools rebuilds it: operations with inputs, outputs, constants, defaults."""
    if not path.is_dir():
        raise UserError(f"{path}: no such package")
    library = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    try:
        spec = library.utils.load_spec(str(path))
    except Exception as error:  # protobuf, the manifest's reader and the file system have one kind each
        raise UserError(f"{path}: not a readable package: {reason(error)}") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise UserError(f"{path}: not an mlprogram")
    function = spec.mlProgram.functions.get(spec.description.defaultFunctionName or "main")
    if function is None:
        raise UserError(f"{path}: has no main function")
    for operation in function.block_specializations[function.opset].operations:
        if operation.type not in OPERATIONS and operation.type != "const":
            name = operation.outputs[0].name if operation.outputs else "without a name"
            raise UserError(f"{path}: operation {name} is of a type that replay does not know: {operation.type}")
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    try:
        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    except Exception as error:
        raise UserError(f"{path}: program or weights are damaged or missing: {reason(error)}") from None
    return program.functions[spec.description.defaultFunctionName or "main"]


def _steps(operations: list, keep: Iterable) -> list[Step]:
    arguments = [
        {name: _argument(given) for name, given in op.inputs.items() if given is not None and name not in SILENT}
        for op in operations
    ]
    outputs = [{variable.name: _port(variable) for variable in op.outputs} for op in operations]
    still_needed = {variable.name for variable in keep if isinstance(variable, Variable)}
    steps = []
    for op, given, made in zip(reversed(operations), reversed(arguments), reversed(outputs)):
        touched = made.keys() | set(_variables(given.values()))
        steps.append(Step(op.op_type, op.outputs[0].name, given, made, tuple(touched - still_needed)))
        still_needed |= touched
    return steps[::-1]


def _argument(variable) -> Any:
    if isinstance(variable, (tuple, list)):
        return tuple(_argument(each) for each in variable)
    if variable.op is None or variable.op.op_type != "const":
        return Variable(variable.name)
    return variable.val if isinstance(variable.val, str) else _tensor(np.asarray(variable.val), _dtype(variable))


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if array.dtype in (np.uint16, np.uint32):
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(dtype)


def _dtype(variable) -> torch.dtype:
    from coremltools.converters.mil.mil import types

    return DTYPES[types.builtin_to_string(variable.dtype)]


def _port(variable) -> Port:
    # Sizes are numpy's integers, floats without a fraction, or symbols.
    sizes = (int(size) if isinstance(size, (int, float, np.number)) else None for size in variable.shape)
    return Port(tuple(sizes), _dtype(variable))


def _fits(x: Tensor, port: Port) -> bool:
    return x.dim() == len(port.shape) and all(size in (None, n) for n, size in zip(x.shape, port.shape))


def _variables(arguments: Iterable) -> Iterator[str]:
    for argument in arguments:
        if isinstance(argument, Variable):
            yield argument.name
        elif isinstance(argument, tuple):
            yield from _variables(argument)


def _look_up(argument: Any, values: dict[str, Tensor]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_look_up(each, values) for each in argument)
    return values[argument.name] if isinstance(argument, Variable) else argument


def _computable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_computable(each) for each in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# ----------------------------------------------------------------------------------------------------------- comparing


def snr(reference: Tensor, value: Tensor) -> float:
    """Signal-to-noise ratio in dB: 10 log10(sum of reference^2 / sum of (value - reference)^2).

    For tensors inside a network: it asks how large the error is beside the numbers themselves, wherever they lie. inf
    where both are equal; -inf where nothing is left of the signal: a NaN anywhere (two of them agree about nothing), an
    infinity on one side only, or an error beside a reference of zeros. Shapes must agree (UserError).
    """
    signal, error = _signal_and_error(reference, value)
    return _decibel(signal.square().sum(), error.square().sum())


def psnr_db(reference: Tensor, value: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak^2 / mean of (value - reference)^2), peak = the reference's range.

    For pictures and a model's outputs, and to compare with figures that exporters publish. The range is larger than the
    typical number, so that this lies above `snr`, by 14 to 20 dB where numbers are normally distributed. inf where
    both are equal; -inf as for `snr`, the reference of zeros being a constant one. Shapes must agree (UserError).
    """
    signal, error = _signal_and_error(reference, value)
    peak = signal.max() - signal.min() if signal.numel() else torch.zeros(())
    return _decibel(peak.square(), error.square().mean())


def _signal_and_error(reference: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's finite numbers, and all errors: infinite where one side alone is, and where there is a NaN."""
    if reference.shape != value.shape:
        raise UserError(f"shapes differ: {tuple(reference.shape)} and {tuple(value.shape)}")
    reference, value = reference.detach().double().flatten(), value.detach().double().flatten()
    # Infinities of one sign agree, as those of a mask do, though their difference is no number.
    error = torch.where(reference == value, 0.0, value - reference).nan_to_num(nan=math.inf)
    return reference[reference.isfinite()], error


def _decibel(signal: Tensor, noise: Tensor) -> float:
    if not noise > 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


class OpDifference(NamedTuple):
    name: str
    op_type: str
    snr_db: float


@dataclass(frozen=True)
class Difference:
    """first: the first output below the threshold, None where there is none. worst: the lowest SNRs, lowest first."""

    first: OpDifference | None
    worst: list[OpDifference]
    compared: int
    unmatched: int  # outputs whose name only one trace has


Trace = Iterable[tuple[str, str, Tensor]]


def first_difference(trace_a: Trace, trace_b: Trace, threshold_db: float = 40.0, worst: int = 5) -> Difference:
    """Compare two traces, output by output, by `snr` with `trace_a` as the reference.

    Say, fp32 against fp16 of one package: first_difference(exact.trace(**x), rounded.trace(**x)). Outputs are paired by
    name; those that are not there under the same name in both are counted and left out. (Between packages: coremltools
    appends `_cast_fp16` to the names of what it computes in fp16.) The traces are read side by side, so that no more is
    held than what still waits for its partner. Paired outputs of different shapes: UserError.
    """
    waiting: tuple[dict, dict] = ({}, {})  # of each trace, by name: place, operation's type, value
    found = []
    for place, pair in enumerate(zip_longest(trace_a, trace_b)):
        for own, entry in zip(waiting, pair):
            if entry is not None:
                name, op_type, value = entry
                own[name] = place, op_type, value
        for name in {entry[0] for entry in pair if entry is not None} & waiting[0].keys() & waiting[1].keys():
            (place_a, op_type, reference), (_, _, value) = waiting[0].pop(name), waiting[1].pop(name)
            found.append((place_a, OpDifference(name, op_type, snr(reference, value))))
    differences = [difference for _, difference in sorted(found)]
    first = next((difference for difference in differences if difference.snr_db < threshold_db), None)
    lowest = sorted(differences, key=lambda difference: difference.snr_db)[:worst]
    return Difference(first, lowest, len(differences), sum(map(len, waiting)))
