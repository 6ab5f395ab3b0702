"""The parts as Apple's newer Core AI assets (`.aimodel`), which Apple's own runtime executes on Linux, too.

What `replay` does with torch, Apple's code does here: a second witness that the graph computes what it should. The packages
are a beta and an extra of their own: pip install "snapgen_core[coreai]".
"""

import asyncio
import inspect
import io
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, reason
from .parts import Part


@contextmanager
def _silent() -> Iterator[None]:
    """Without what Apple's runtime, which is no Python, writes to stderr."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _libraries():
    try:
        import coreai.authoring.asset as asset
        import coreai.runtime as runtime
        import coreai_torch
    except ImportError as error:
        raise UserError(f'Core AI assets need Apple\'s packages: pip install "snapgen_core[coreai]" ({reason(error)})') from None
    return coreai_torch, asset, runtime


def save(part: Part, path: Path) -> Path:
    """Write the part as `path`, an `.aimodel`, with the contract's names, in 32 bits.

    Raises:
        UserError: Apple's packages are missing, the name does not end in .aimodel, or the graph cannot be converted.
    """
    coreai_torch, _, _ = _libraries()
    if path.suffix != ".aimodel":
        raise UserError(f"a Core AI asset needs a name that ends in .aimodel, not {path.name!r}")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.export.export(part.module, tuple(part.inputs.values())).run_decompositions(coreai_torch.get_decomp_table())
        try:
            converter = coreai_torch.TorchConverter().add_exported_program(exported, input_names=list(part.inputs), output_names=list(part.outputs))
            converter.to_coreai().save_asset(path)
        except Exception as error:  # its compiler raises kinds of its own
            raise UserError(f"Core AI cannot hold {part.name}: {reason(error)}") from error
    return path


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """Execute an asset with Apple's runtime. Raises UserError where it is missing or damaged."""
    _, asset, runtime = _libraries()
    if not path.exists():
        raise UserError(f"{path}: no such asset")

    async def answer() -> dict[str, Tensor]:
        async with asset.AIModelAsset.load(path).executable() as model:
            function = model.load_function("main")
            found = function({name: runtime.NDArray(value.numpy()) for name, value in inputs.items()})
            found = await found if inspect.isawaitable(found) else found
            return {name: torch.from_numpy(value.numpy().copy()) for name, value in found.items()}

    try:
        with _silent(), ThreadPoolExecutor(1) as aside:  # a notebook's thread has a loop of its own, in which no other may run
            return aside.submit(asyncio.run, answer()).result()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: Core AI cannot run it: {reason(error)}") from None
