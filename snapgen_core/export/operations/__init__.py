"""The operations of Core ML's mlprograms as small functions of tensors.

Names of operations and of their parameters, defaults and shapes are those of the operations' documentation, which comes
with coremltools (`coremltools.converters.mil.mil.ops.defs`, opsets iOS15 to iOS18). A function takes the inputs that an
operation has in the package: tensors on the CPU, floats always as fp32; strings; tuples of tensors. It returns a tensor,
or a tuple where the operation has several outputs, and never changes what it was given. The types that the package
declares for outputs are the caller's job: `cast` does nothing else.
"""

from collections.abc import Callable

from .arithmetic import ARITHMETIC
from .constants import CONSTANTS
from .layers import LAYERS
from .shapes import SHAPES

# Inputs that change no number: types, which the declared outputs have anyway, and what to check.
SILENT = {"dtype", "output_dtype", "output_indices_dtype", "validate_indices", "sort"}

OPERATIONS: dict[str, Callable] = ARITHMETIC | LAYERS | SHAPES | CONSTANTS
