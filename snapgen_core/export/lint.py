"""What in a saved package will not run on the Neural Engine, or wastes it: found without the engine, by its known rules.

The engine computes in 16 bits, on maps of fixed size with at most five axes, and pads the last axis of each to 64 bytes
[Apple 2022, "Deploying Transformers on the Apple Neural Engine"]. Whatever breaks a rule runs on GPU or CPU, and every change
of place costs a copy. Only Apple's own compute plan, on a Mac, tells where an operation really runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .phone import LARGEST
from .replay import load_function

ROW_BYTES = 64  # to which the engine pads the last axis
ELSEWHERE = {  # operations that the engine has no part for
    "gather": "looks up a table",
    "gather_nd": "looks up a table",
    "gather_along_axis": "looks up a table",
    "scatter": "writes to computed places",
    "scatter_nd": "writes to computed places",
    "cumsum": "sums along an axis, one after the other",
    "argsort": "sorts",
    "topk": "sorts",
    "non_zero": "has an output of unknown size",
    "while_loop": "decides while it runs",
    "cond": "decides while it runs",
}


@dataclass(frozen=True)
class Finding:
    """A rule that an operation breaks. `leaves`: it runs elsewhere; otherwise it only wastes."""

    operation: str
    op_type: str
    reason: str
    leaves: bool


def lint(path: Path) -> list[Finding]:
    """Every finding in a saved package, in the program's order. Raises UserError as `Replay`."""
    from coremltools.converters.mil.mil import types

    function = load_function(Path(path))
    return [Finding(op.outputs[0].name, op.op_type, *found) for op in function.operations for found in _broken(op, types)]


def _broken(op, types) -> Iterator[tuple[str, bool]]:
    """(reason, leaves) for each rule that `op` breaks."""
    if op.op_type == "const":
        value = op.outputs[0].val
        if isinstance(value, np.ndarray | np.floating) and np.issubdtype(value.dtype, np.floating) and np.size(value) and not np.abs(value).max() <= LARGEST:
            yield f"holds a number beyond {LARGEST:g}, infinite in 16 bits", True
        return
    if op.op_type.startswith("constexpr"):
        return  # weights are decompressed as they are loaded
    if op.op_type in ELSEWHERE:
        yield ELSEWHERE[op.op_type], True
    for output in op.outputs:
        shape, kind = output.shape, types.builtin_to_string(output.dtype)
        if kind in ("fp32", "int32"):
            yield f"computes in {kind}", True
        if any(not isinstance(size, int | np.integer) for size in shape):
            yield "has a size that is known only when it runs", True
            continue
        if len(shape) > 5:
            yield f"has {len(shape)} axes, where five are the most", True
        if kind == "fp16" and len(shape) >= 4 and np.prod(shape) > np.prod(shape[:2]) and shape[-1] * 2 < ROW_BYTES:
            yield f"has rows of {shape[-1] * 2} bytes, padded to {ROW_BYTES}", False


def summary(findings: list[Finding]) -> list[str]:
    """Findings of one kind and reason, a line each: how often, where first."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        kinds.setdefault((finding.op_type, finding.reason), []).append(finding.operation)
    return [f"{len(names)} x {op_type}: {reason}; first {names[0]}" for (op_type, reason), names in kinds.items()]


def report(path: Path) -> dict[str, list[str]]:
    """`summary` of a package: what "leaves" the engine, and what stays and "wastes" it."""
    found = lint(path)
    return {kind: summary([finding for finding in found if finding.leaves == leaves]) for kind, leaves in (("leaves", True), ("wastes", False))}
