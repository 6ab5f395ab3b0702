"""Palettization: every weight becomes an index of 4 or 8 bits into a palette of its layer, found by k-means.

The method is that of SnapGen++, Supplement C: "we quantize all linear and convolutional layer weights using k-means
clustering over their values. Most layers are quantized to 4 bits (16 clusters), while more sensitive layers are assigned
8 bits"; then "we freeze the weights and fine-tune the remaining parameters, such as biases and normalization layers, using
self-distillation". In its order: `sensitivities`, `plan`, `palettize`, `tune`; last, `to_mlpackage` stores a converted
model's weights as these very palettes and indices.

Where the supplement leaves room: a palette belongs to a whole tensor; the average of 4.3 bits is that of the indices, over
the palettised weights; palettes are rounded to the 16 bits in which they are stored, before weights choose their nearest
value, so that the torch module computes with the package's weights to the last bit; and a layer so small that its palette
would outweigh the savings keeps 16 bits.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from .kmeans import Palette, kmeans_1d
from .replay import coremltools

PACKAGE_BITS = (1, 2, 4, 6, 8)  # widths of indices in Core ML from iOS 16 on
SMALL = 512  # weights: so many or fewer, and 256 palette entries of 16 bits take all that indices of 8 bits save
Palettes = dict[str, Palette]  # by the name of the layer
LAYERS = (nn.Conv2d, nn.Linear)


# ---- which layers get how many bits ----


def palettizable(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """All Conv2d and Linear layers by name, except those of up to 512 weights. One weight for several layers is listed once."""
    layers, seen = {}, set()
    for name, layer in module.named_modules():
        if isinstance(layer, LAYERS) and layer.weight.numel() > SMALL and layer.weight not in seen:
            seen.add(layer.weight)
            layers[name] = layer
    return layers


def find_palettes(module: nn.Module, bits: dict[str, int]) -> Palettes:
    """k-means of each layer in `bits`; at 4 bits about a minute for 400 million weights. Changes nothing. Raises UserError."""
    layers = _chosen(module, bits)
    palettes = {}
    for name, width in tqdm(bits.items(), desc="palettes", unit="layer", disable=None):
        try:
            palettes[name] = kmeans_1d(layers[name].weight.detach().float().cpu().numpy(), width)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return palettes


@torch.no_grad()
def sensitivities(network: nn.Module, batches: Iterable, bits: int = 4) -> dict[str, float]:
    """MSE of each layer's output when that layer alone is palettised to `bits`, by the layer's name.

    The supplement: "for each layer, we measure the mean-squared error (MSE) between the layer's quantized output and the
    corresponding output from the unquantized model, when quantizing that layer in isolation". In isolation a layer's
    inputs are those of the unquantised network; and as it is linear and keeps its bias, its output differs by what
    (palettised weight - weight) makes of them. So one pass of the network over the batches measures all layers, for twice
    a pass's work and one more copy of the weights. A layer that the batches never reach has 0.

    Args:
        network: in eval mode, on the device of the batches.
        batches: of inputs, each a tensor or a tuple of tensors: `network(*batch)`.

    Raises:
        UserError: there is no batch, or a layer's error is not finite.
    """
    layers = palettizable(network)
    palettes = find_palettes(network, dict.fromkeys(layers, bits))
    changes = {layer.weight: _tensor(palettes[name], layer.weight) - layer.weight for name, layer in layers.items()}
    squares, counts = dict.fromkeys(changes, 0.0), dict.fromkeys(changes, 0)

    def measure(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        change = changes[layer.weight]
        moved = F.linear(inputs[0], change) if isinstance(layer, nn.Linear) else layer._conv_forward(inputs[0], change, None)
        squares[layer.weight] += moved.float().square().mean().item() * moved.numel()
        counts[layer.weight] += moved.numel()

    measured = [layer for layer in network.modules() if isinstance(layer, LAYERS) and layer.weight in changes]
    hooks = [layer.register_forward_hook(measure) for layer in measured]
    passes = 0
    try:
        for batch in batches:
            _answer(network, batch)
            passes += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not passes:
        raise UserError("sensitivities are measured on batches of inputs, and there is none")
    errors = {name: squares[layer.weight] / max(counts[layer.weight], 1) for name, layer in layers.items()}
    _check_finite(errors)
    return errors


def plan(sensitivities: dict[str, float], sizes: dict[str, int], target_bits: float = 4.3, low: int = 4, high: int = 8) -> dict[str, int]:
    """Bits of each layer: `high` for the most sensitive, `low` for the rest, at most `target_bits` on average.

    "Layers with the largest degradation in MSE are designated as sensitive and quantized at 8 bits, resulting in an
    overall average quantization of 4.3 bits." Greedy: from the most sensitive layer down, each gets `high` bits if the
    average then still is within the target. A layer too large for what is left is passed over and smaller ones after it may
    still fit, as a large layer at the top would otherwise leave every layer at `low`. Of equals the first goes first.

    Args:
        sizes: weights of each layer; the average is over weights.

    Raises:
        UserError: the target is less than `low`, a width is not one of Core ML's, a sensitivity is not finite, or a layer has no size.
    """
    if low not in PACKAGE_BITS or high not in PACKAGE_BITS or low > high:
        raise UserError(f"choose two of {', '.join(map(str, PACKAGE_BITS))} bits, the lower one first, not {low} and {high}")
    if not target_bits >= low:
        raise UserError(f"an average of {target_bits:g} bits is out of reach where no layer has fewer than {low}")
    if missing := [name for name in sensitivities if name not in sizes]:
        raise UserError(f"no size is known of {', '.join(missing)}")
    _check_finite(sensitivities)
    total = sum(sizes[name] for name in sensitivities)
    room = (target_bits - low) * total * (1 + 1e-12)  # bits beyond `low`; a target met exactly must not fail by rounding
    chosen = dict.fromkeys(sensitivities, low)
    for name in sorted(sensitivities, key=sensitivities.get, reverse=True):
        price = (high - low) * sizes[name]
        if price <= room:
            chosen[name] = high
            room -= price
    return chosen


def average_bits(plan: dict[str, int], sizes: dict[str, int]) -> float:
    """Mean width of the indices over all weights of the plan's layers."""
    return sum(bits * sizes[name] for name, bits in plan.items()) / max(sum(sizes[name] for name in plan), 1)


def size_in_bytes(module: nn.Module, plan: dict[str, int]) -> int:
    """Parameters of the palettised module as a package stores them: packed indices, palettes, and the rest in 16 bits."""
    layers = _chosen(module, plan)
    packed = sum((layers[name].weight.numel() * bits + 7) // 8 + 2 * 2**bits for name, bits in plan.items())
    rest = sum(p.numel() for p in module.parameters()) - sum(layers[name].weight.numel() for name in plan)
    return packed + 2 * rest


# ---- palettising and tuning a module ----


@torch.no_grad()
def palettize(module: nn.Module, plan: dict[str, int]) -> Palettes:
    """Replace the weights that `plan` names, in place, by palettised ones, and return their palettes and indices.

    Layers without an entry, biases, norms and everything else stay as they are.

    Raises:
        UserError: `plan` names no Conv2d or Linear layer, or weights cannot be palettised; the module is then unchanged.
    """
    layers = _chosen(module, plan)
    if coarse := [name for name in plan if layers[name].weight.dtype == torch.bfloat16]:
        raise UserError(f"bfloat16 has too few digits for a palette of float16: use .float() on {', '.join(coarse)}")
    palettes = find_palettes(module, plan)
    for name, palette in palettes.items():
        layers[name].weight.copy_(_tensor(palette, layers[name].weight))
    return palettes


def tune(module: nn.Module, reference: nn.Module, batches: Iterable, steps: int, learning_rate: float = 1e-3, progress: bool = True) -> list[float]:
    """Self-distillation: the palettised `module` learns to answer as the unquantised `reference`. Returns each step's MSE.

    As in the supplement weights are frozen and "the remaining parameters, such as biases and normalization layers" learn:
    all vectors, whatever axes of length 1 they have beside. AdamW without weight decay, which would pull the norms' scales
    to zero. Both networks are put into eval mode and left there.

    Args:
        batches: as for `sensitivities`: a list, gone round as often as needed, or an endless generator.
        learning_rate: ours; the supplement names none. 1e-3 was the lowest of those that learned quickest on the tiny twin.

    Raises:
        UserError: there is nothing to tune or no batch, or the error is no longer finite.
    """
    weights = {layer.weight for layer in module.modules() if isinstance(layer, LAYERS)}
    flags = {p: p.requires_grad for p in module.parameters()}
    learning = [p for p in flags if p not in weights and p.numel() == max(p.shape, default=1)]
    if not learning:
        raise UserError("the network has no biases or norms to tune")
    module.requires_grad_(False)
    for p in learning:
        p.requires_grad_(True)
    module.eval()
    reference.eval()
    optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0)
    losses = []
    try:
        for _, batch in zip(tqdm(range(steps), desc="tune", unit="step", disable=None if progress else True), _rounds(batches)):
            with torch.no_grad():
                wanted = _answer(reference, batch)
            loss = F.mse_loss(_answer(module, batch).float(), wanted.float())
            if not loss.isfinite():
                raise UserError(f"not finite at step {len(losses) + 1} of tuning: error {loss.item()}; try a lower learning rate")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return losses


# ---- into a Core ML package ----


def to_mlpackage(model, palettes: Palettes, names: Iterable[str] | None = None):
    """Store the weights of `model`, converted from the palettised module, as our palettes and indices: a new MLModel.

    A weight is recognised by its values. The module that was converted computes with palettised weights, so a constant that
    came from a layer holds nothing but values of that layer's palette, however the converter named, reshaped, transposed or
    cut it; and looking its values up in the palette gives its indices. So no match can be wrong: whatever palette is taken,
    the weights that come out are those that went in, to the bit. (A constant that the converter has multiplied with
    something is not recognised; its layer is then reported missing.)

    Args:
        model: `coremltools.models.MLModel`, an mlprogram for iOS16 or later with weights in 16 or 32 bits.
        names: layers that must be found in it; all by default. (Less where a package holds a part of the module.)

    Raises:
        UserError: coremltools is missing, a layer is not found or its weights stayed as they were, or a palette's width is not one of Core ML's.
    """
    coremltools()
    from coremltools.optimize import coreml

    names = list(palettes if names is None else names)
    if wrong := [name for name in names if name not in palettes or palettes[name].bits not in PACKAGE_BITS]:
        raise UserError(f"no palette of {', '.join(map(str, PACKAGE_BITS))} bits for {', '.join(wrong)}")
    owners = _owners(_weights(coreml, model), {name: palettes[name] for name in names})
    if lost := [name for name in names if not any(name in layers for layers in owners.values())]:
        raise UserError(f"the package holds no weights with the palettes of {', '.join(lost[:3])}{f' and {len(lost) - 3} others' * (len(lost) > 3)}: convert the module after it was palettised")
    lookups = {constant: _Lookup(min((palettes[name].values for name in layers), key=len)) for constant, layers in owners.items()}
    configs = {constant: coreml.OpPalettizerConfig(mode="custom", lut_function=lookup, weight_threshold=0) for constant, lookup in lookups.items()}
    packed = coreml.palettize_weights(model, coreml.OptimizationConfig(op_name_configs=configs))
    if left := [constant for constant, lookup in lookups.items() if not lookup.called]:
        raise UserError(f"coremltools left {', '.join(left)} as they were")  # it skips what it does not know, with a warning
    return packed


class _Lookup:
    """What coremltools calls with a constant's values: the palette in their type, and their indices, flat."""

    def __init__(self, values: np.ndarray):
        self.values, self.called = values, False

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.called = True
        return self.values.astype(weight.dtype), np.searchsorted(self.values, weight.reshape(-1)).astype(np.uint8)


def _weights(coreml, model) -> dict[str, np.ndarray]:
    """Constants of two axes or more that a convolution or matrix product takes, by name."""
    constants = coreml.get_weights_metadata(model, weight_threshold=1)
    users = {"conv", "linear", "matmul"}
    return {name: c.val for name, c in constants.items() if c.val.ndim > 1 and users & {op.op_type for op in c.child_ops}}


def _owners(weights: dict[str, np.ndarray], palettes: Palettes) -> dict[str, list[str]]:
    """The layers that each constant may come from; constants from none are left out.

    Those that use just the constant's values (several where weights are equal, which the converter merges); else, as it may
    be a piece of a weight, those that use all of its values and more.
    """
    used, exact, owners = {}, {}, {}
    for name, palette in palettes.items():
        used[name] = np.unique(palette.values[np.unique(palette.indices)].astype(np.float32))
        exact.setdefault(used[name].tobytes(), []).append(name)
    for constant, weight in weights.items():
        values = np.unique(weight.astype(np.float32))  # numpy 2.4 does not find all duplicates among many float16 numbers
        layers = exact.get(values.tobytes())
        if layers is None and 1 < len(values) <= 256:  # one value alone, such as 0, tells nothing
            layers = [name for name, own in used.items() if np.isin(values, own).all()]
        if layers:
            owners[constant] = layers
    return owners


# ---- helpers ----


def _chosen(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Conv2d | nn.Linear]:
    """The module's layers by name. Raises UserError where one of `names` is not among them."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
    if unknown := [name for name in names if name not in layers]:
        raise UserError(f"no Conv2d or Linear layer is called {', '.join(unknown)}")
    return layers


def _tensor(palette: Palette, like: Tensor) -> Tensor:
    """The palettised weight with the type and the device of `like`."""
    return torch.from_numpy(palette.weight()).to(like)


def _answer(network: nn.Module, batch: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The network's output, or the first of several."""
    output = network(*((batch,) if isinstance(batch, Tensor) else batch))
    return output if isinstance(output, Tensor) else output[0]


def _rounds(batches: Iterable) -> Iterator:
    """The batches again and again (not `itertools.cycle`, which would keep all that a generator has made)."""
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise UserError("tuning needs batches of inputs, and there is none left")


def _check_finite(errors: dict[str, float]) -> None:
    if broken := [name for name, error in errors.items() if not np.isfinite(error)]:
        raise UserError(f"the error is not finite in {', '.join(broken)}")
