"""A pipeline as a bundle of Core ML packages, with all that an app needs beside them (`snapgen export`).

The way is torch.export, then coremltools: mlprograms, 16 bits inside, 32-bit inputs and outputs. One thing stays in 32 bits:
the timestep's sines and cosines, for in 16 bits a timestep of 900.3 is 900.5, and every block would hear of another noise
level than the sampler's.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import flow
from ..errors import UserError, reason
from ..files import atomic_folder, write_json
from ..pipeline import SnapGenPipeline
from ..text import clip_files
from . import coreai
from .lint import report
from .palettize import to_mlpackage
from .parts import DenoiserPart, Part, parts
from .replay import coremltools
from .squeeze import calibration, squeeze

TARGETS = ("iOS17", "iOS18")


# ------------------------------------------------------------------------------------------------- conversion


def convert(part: Part, target: str = "iOS18"):
    """The part as an `MLModel` with the contract's names.

    Raises:
        UserError: coremltools is missing, the target is unknown, or it cannot hold the graph.
    """
    ct = coremltools()
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    _register_operations()
    with _quiet():
        exported = torch.export.export(part.module, tuple(part.inputs.values())).run_decompositions({})
        try:
            return ct.convert(
                exported,
                convert_to="mlprogram",
                inputs=[ct.TensorType(name=name, shape=tuple(example.shape), dtype=np.float32) for name, example in part.inputs.items()],
                outputs=[ct.TensorType(name=name, dtype=np.float32) for name in part.outputs],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=ct.transform.FP16ComputePrecision(op_selector=_In16Bits()),
                skip_model_load=True,  # only Apple's systems can load it
            )
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise UserError(f"{target} cannot hold {part.name}: {reason(error)}") from error


class _In16Bits:
    """Called with an operation: False for sines and cosines, and for all that their angles are made of, back to the input."""

    def __init__(self):
        self._angles: set[str] | None = None  # names of those operations

    def __call__(self, operation) -> bool:
        if self._angles is None:
            self._angles, ahead = set(), [other for other in operation.enclosing_block.operations if other.op_type in ("sin", "cos")]
            while ahead:
                found = ahead.pop()
                if found is not None and found.name not in self._angles:
                    self._angles.add(found.name)
                    ahead += [value.op for value in found.get_flattened_inputs()]
        return operation.name not in self._angles


def _register_operations() -> None:
    """Tell coremltools of an operation that it lacks: torch.export's `alias`, which hands a tensor on."""
    from coremltools.converters.mil.frontend.torch import torch_op_registry as registry
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    if "alias" not in registry._TORCH_OPS_REGISTRY.name_to_func_mapping:

        @registry.register_torch_op
        def alias(context, node):
            context.add(_get_inputs(context, node, expected=1)[0], torch_name=node.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' own bars and warnings: a bundle has one bar."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------- the bundle


def export(pipe: SnapGenPipeline, folder: Path, facts: dict, target: str = "iOS18", guided: bool = True, bits: float | None = None, core_ai: bool = False) -> list[Part]:
    """Write the bundle of `pipe` to `folder`, whole or not at all, in the place of what is there. Returns the parts that were
    converted, to be compared with the bundle.

    It holds a `.mlpackage` for each part, the CLIPs' `vocab.json` and `merges.txt`, `manifest.json`, and a README for the
    phone's side.

    Args:
        facts: what the manifest says of the model's origin: scale, stage.
        guided: False for a student that draws without guidance.
        bits: of the denoiser's weights, on average (`squeeze`); the others stay at 16, as does this one without `bits`.
        core_ai: also write each part as a Core AI asset.

    Raises:
        UserError: no tiny decoder, no tokenizer files, no coremltools, a target that cannot hold the graph, or no such palettes.
    """
    made, palettes, squeezed = parts(pipe, guided), {}, {}
    if bits is not None:
        denoiser = next(part.module for part in made if isinstance(part.module, DenoiserPart))
        palettes, squeezed = squeeze(denoiser.unet, calibration(pipe, guided), bits)
    with atomic_folder(folder) as part_folder:
        for name, text in clip_files(pipe.text.tokenizers["clip_l"]).items():
            (part_folder / name).write_text(text, "utf-8")
        entries = {}
        for part in (bar := tqdm(made, desc="export", unit="part", dynamic_ncols=True)):
            bar.set_postfix_str(part.name)
            path = part_folder / f"{part.name}.mlpackage"
            model = convert(part, target)
            if palettes and isinstance(part.module, DenoiserPart):
                with _quiet():
                    model = to_mlpackage(model, palettes)
            model.save(str(path))
            entries[part.name] = _entry(part, path)
            if core_ai:
                coreai.save(part, part_folder / f"{part.name}.aimodel")
        manifest = {
            **facts,
            "target": target,
            "precision": "fp16, the timestep's embedding fp32",
            "guided": guided,
            "palettes": squeezed,
            "parts": entries,
            "lint": {name: report(part_folder / entry["file"]) for name, entry in entries.items()},
            "latents": {"channels": pipe.unet.config.in_channels, "size": pipe.config.image_size // 8, "scale": pipe.vae.config.scaling_factor, "shift": pipe.vae.config.shift_factor},
            "tokens": {"clip": pipe.text.shape.clip_tokens, "language_model": pipe.text.shape.lm_tokens},
            "sampler": {"kind": "flow matching, Euler", "time_shift": pipe.scheduler.config.shift, "timestep": "1000 * sigma", "sigmas_of_4_steps": [round(s, 6) for s in flow.inference_sigmas(4, pipe.scheduler.config.shift).tolist()]},
        }
        write_json(part_folder / "manifest.json", manifest)
        (part_folder / "README.md").write_text(_readme(manifest), "utf-8")
    return made


def _entry(part: Part, path: Path) -> dict:
    """What the manifest says of one package."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        if file.name != "Manifest.json":  # coremltools writes new identifiers into it every time
            total.update(file.read_bytes())
    ports = {
        "inputs": [{"name": name, "shape": list(example.shape), "dtype": "float32"} for name, example in part.inputs.items()],
        "outputs": [{"name": name, "shape": list(value.shape), "dtype": "float32"} for name, value in part.answers(part.inputs).items()],
    }
    return {"file": path.name, **ports, "bytes": sum(file.stat().st_size for file in files), "sha256": total.hexdigest()}


def read_manifest(folder: Path) -> dict:
    """A bundle's manifest. Raises UserError where there is none, or one of its packages is missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        missing = [entry["file"] for entry in manifest["parts"].values() if not (folder / entry["file"]).is_dir()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no bundle: {reason(error)} (manifest.json)") from None
    if missing:
        raise UserError(f"the bundle {folder} lacks {', '.join(missing)}: export it again")
    return manifest


def _readme(manifest: dict) -> str:
    rows = "\n".join(f"| `{entry['file']}` | {entry['bytes'] / 1e6:.1f} MB | {', '.join(p['name'] for p in entry['inputs'])} | {', '.join(p['name'] for p in entry['outputs'])} |" for entry in manifest["parts"].values())
    mixing = "It was distilled to draw without guidance: it computes the prompt's half alone and answers it twice, so the app's guidance scale changes nothing." if not manifest["guided"] else "It answers prompt and negative prompt, in this order; the app mixes the two."
    return f"""# SnapGen for a phone

Packages for Core ML ({manifest['target']} or later), with the names and the order that Apple's ml-stable-diffusion expects of Stable Diffusion 3.

| package | size | inputs | outputs |
|---|---|---|---|
{rows}

1. Compile them on a Mac: `for p in *.mlpackage; do xcrun coremlcompiler compile $p .; done`.
2. Put the `.mlmodelc` folders, `vocab.json` and `merges.txt` into the app's resources.
3. {mixing}
4. Ask the app for one step more than you want: its scheduler shifts both ends of the time axis and spends the last step at a noise level of 0.009. An app of your own should use the levels in `manifest.json`, `sigmas_of_4_steps`.
5. Before decoding, the app divides latents by a scale and adds a shift of its own, 1.5305 and 0.0609, those of Stable Diffusion 3. This bundle's are {manifest['latents']['scale']:.4f} and {manifest['latents']['shift']:.4f}.

Prompts are cut at {manifest['tokens']['clip']} tokens. `TextEncoder3`, the language model, is for apps of your own: Apple's knows T5 in its place, leaves ours out and fills its {manifest['tokens']['language_model']} tokens with zeros, as the student was trained to accept. Where guidance is used, the unconditional half is a context of zeros, not the embedding of an empty prompt.
"""
