"""Sensitivities, plans and sizes by hand, and a Core ML package that holds exactly our palettes and indices."""

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from snapgen_core.errors import UserError
from snapgen_core.export.palettize import average_bits, kmeans_1d, palettizable, palettize, plan, sensitivities, size_in_bytes, to_mlpackage, tune

# ---- sensitivities and plans ----


class Small(nn.Module):
    """Two convolutions, a norm, and a linear layer that is called twice; one layer too small for a palette, one unused."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 32, 3, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.GroupNorm(4, 32)
        self.second = nn.Conv2d(32, 32, 3, groups=4, bias=False)
        self.tokens = nn.Linear(32, 32)
        self.tiny = nn.Linear(32, 16)
        self.unused = nn.Linear(32, 32)

    def forward(self, x, shift):
        h = self.second(torch.nn.functional.silu(self.norm(self.first(x) + shift)))
        h = h.flatten(2).transpose(1, 2)
        a, b = h.split([2, h.shape[1] - 2], dim=1)
        h = torch.cat([self.tokens(a), self.tokens(b)], dim=1)
        return self.tiny(torch.nn.functional.gelu(h)), h


SIZES = {"first": 32 * 4 * 9, "second": 32 * 8 * 9, "tokens": 1024, "unused": 1024}


def inputs(count=3, seed=1):
    """Positive images, so that changed weights shift a layer's mean, which biases can put right."""
    generator = torch.Generator().manual_seed(seed)
    return [(1 + torch.rand(2, 4, 10, 10, generator=generator), torch.tensor(0.1)) for _ in range(count)]


def outputs_of(network, name, batches):
    kept = []
    hook = network.get_submodule(name).register_forward_hook(lambda layer, given, output: kept.append(output.flatten()))
    with torch.no_grad():
        for batch in batches:
            network(*batch)
    hook.remove()
    return torch.cat(kept) if kept else torch.zeros(1)


def test_layers_that_get_palettes():
    assert {name: layer.weight.numel() for name, layer in palettizable(Small()).items()} == SIZES
    shared = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    shared[1].weight = shared[0].weight
    assert list(palettizable(shared)) == ["0"]


@pytest.mark.parametrize("bits", [2, 4])
def test_sensitivity_is_the_mse_of_a_layers_output_with_only_that_layer_palettised(bits):
    network, batches = Small().eval(), inputs()
    before = copy.deepcopy(network.state_dict())
    found = sensitivities(network, iter(batches), bits)
    for name in SIZES:
        alone = copy.deepcopy(network)
        palettize(alone, {name: bits})
        expected = nn.functional.mse_loss(outputs_of(alone, name, batches), outputs_of(network, name, batches)).item()
        assert found[name] == pytest.approx(expected, rel=1e-4)
    assert list(found) == list(SIZES) and found["unused"] == 0
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(layer._forward_hooks for layer in network.modules())


def test_sensitivities_by_hand():
    """Weights halfway between 1-bit palette entries move by 1: outputs move by +-1 times inputs."""
    network = nn.Sequential(nn.Linear(2, 400, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[-11.0, 11.0], [-9.0, 9.0]]).repeat(200, 1))
    x = torch.tensor([[1.0, 3.0]])
    # Palette -10 and 10: rows of changes (1, -1) and (-1, 1), outputs moved by -2 and 2.
    assert sensitivities(network, [x, x], bits=1) == {"0": pytest.approx(4.0)}


def test_sensitivities_need_batches_and_finite_errors():
    with pytest.raises(UserError, match="there is none"):
        sensitivities(Small(), [])
    with pytest.raises(UserError, match="not finite in first"):
        sensitivities(Small().eval(), [(torch.full((1, 4, 8, 8), torch.inf), 0)])


def test_a_plan_by_hand():
    errors = {"a": 0.5, "huge": 9.0, "b": 3.0, "c": 0.1, "d": 0.4}
    sizes = {"a": 100, "huge": 600, "b": 50, "c": 200, "d": 50, "other": 7}
    # 4.6 bits for 1,000 weights leave 600 bits beyond 4: not the huge layer's 2,400; b 200 (400 left), a 400 (none left).
    chosen = plan(errors, sizes, 4.6)
    assert chosen == {"a": 8, "huge": 4, "b": 8, "c": 4, "d": 4}
    assert average_bits(chosen, sizes) == pytest.approx((4 * 850 + 8 * 150) / 1000) == 4.6
    assert plan(errors, sizes, 4.5) == {"a": 4, "huge": 4, "b": 8, "c": 4, "d": 8}  # a is too large for what b leaves, d is not
    assert set(plan(errors, sizes, 4).values()) == {4} and set(plan(errors, sizes, 8).values()) == {8}
    assert plan(errors, sizes, 3, low=2, high=6) == {"a": 6, "huge": 2, "b": 6, "c": 2, "d": 6}


@pytest.mark.parametrize("target", [4.0, 4.3, 5.1, 7.9])
def test_an_average_is_met_from_below_and_by_the_most_sensitive(target):
    rng = np.random.default_rng(0)
    errors = {str(i): value for i, value in enumerate(rng.random(200))}
    sizes = dict.fromkeys(errors, 640)
    chosen = plan(errors, sizes, target)
    assert target - 4 / 200 < average_bits(chosen, sizes) <= target
    assert min([errors[i] for i in errors if chosen[i] == 8], default=1) > max(errors[i] for i in errors if chosen[i] == 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target_bits": 3.9}, "out of reach"), ({"target_bits": float("nan")}, "out of reach"), ({"low": 5}, "not 5 and 8"), ({"low": 8, "high": 4}, "lower one first")],
)
def test_plans_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        plan({"a": 1.0}, {"a": 10}, **options)


def test_plans_need_sizes_and_finite_errors():
    with pytest.raises(UserError, match="no size is known of b"):
        plan({"a": 1.0, "b": 1.0}, {"a": 10})
    with pytest.raises(UserError, match="not finite in a"):
        plan({"a": float("nan")}, {"a": 10})


def test_sizes_by_hand():
    # Parameters: 1184 + 64 + 2304 + 1056 + 528 + 1056. In palettes: 1152 at 8 bits, 2304 at 4; 2 bytes each for the others.
    assert size_in_bytes(Small(), {"first": 8, "second": 4}) == (1152 + 512) + (1152 + 32) + 2 * (32 + 64 + 1056 + 528 + 1056)
    assert size_in_bytes(Small(), {}) == 2 * 6192
    assert size_in_bytes(nn.Linear(3, 5, bias=False).to("meta"), {"": 6}) == 12 + 128  # 90 bits in 12 bytes
    with pytest.raises(UserError, match="no Conv2d or Linear layer is called norm, third"):
        size_in_bytes(Small(), {"first": 8, "norm": 4, "third": 4})


# ---- palettising and tuning ----


def test_palettising_changes_the_planned_weights_alone():
    network = Small().to(memory_format=torch.channels_last)
    before = copy.deepcopy(network.state_dict())
    palettes = palettize(network, {"first": 8, "tokens": 4})
    assert list(palettes) == ["first", "tokens"] and palettes["first"].bits == 8
    for name, palette in palettes.items():
        weight = network.get_submodule(name).weight
        assert np.array_equal(weight.detach().numpy(), palette.weight().astype(np.float32)) and weight.requires_grad
        assert len(weight.unique()) <= 2**palette.bits and weight.is_contiguous(memory_format=torch.channels_last) == (weight.ndim == 4)
        assert np.array_equal(palette.indices, kmeans_1d(before[f"{name}.weight"].numpy(), palette.bits).indices)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items() if name not in ("first.weight", "tokens.weight"))
    twice = palettize(copy.deepcopy(network), {"first": 8, "tokens": 4})
    assert all(np.array_equal(twice[name].weight(), palettes[name].weight()) for name in palettes)


def test_a_broken_layer_is_named_and_leaves_the_module_as_it_was():
    network = Small()
    with torch.no_grad():
        network.tokens.weight[3, 4] = torch.nan
    before = network.first.weight.clone()
    with pytest.raises(UserError, match="^tokens: .*finite"):
        palettize(network, {"first": 4, "tokens": 4})
    with pytest.raises(UserError, match="called missing"):
        palettize(network, {"first": 4, "missing": 4})
    with pytest.raises(UserError, match="bfloat16"):
        palettize(Small().bfloat16(), {"first": 4})
    assert torch.equal(before, network.first.weight)


def test_tuning_lowers_the_error_by_biases_and_norms_alone():
    reference, unseen = Small(), inputs(4, seed=9)
    module = copy.deepcopy(reference)
    module.norm.weight = nn.Parameter(module.norm.weight.detach().clone())
    module.tiny.weight.requires_grad_(False)
    palettize(module, dict.fromkeys(SIZES, 2))
    before = copy.deepcopy(module.state_dict())

    def distance():
        with torch.no_grad():
            return np.mean([nn.functional.mse_loss(module(*batch)[0], reference(*batch)[0]).item() for batch in unseen])

    untuned = distance()
    losses = tune(module, reference, inputs(8), 60, progress=False)
    assert len(losses) == 60 and np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8]) and distance() < 0.5 * untuned
    moved = {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {"first.bias", "norm.weight", "norm.bias", "tokens.bias", "tiny.bias"}
    assert all(p.grad is None for p in [*module.parameters(), *reference.parameters()])
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["tiny.weight"]


class Scale(nn.Module):
    """A norm's scale in the layout of maps, [1, C, 1, 1], behind a convolution whose weight has that shape, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 1, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x):
        return self.conv(x * self.scale)


def test_scales_in_the_layout_of_maps_are_tuned_too():
    torch.manual_seed(0)
    module, reference = Scale(), Scale()
    before = module.conv.weight.clone()
    tune(module, reference, (torch.randn(2, 8, 4, 4) for _ in itertools.count()), 3, progress=False)
    assert torch.equal(before, module.conv.weight) and (module.scale != 1).all()


def test_tuning_that_cannot_be():
    x = torch.ones(1, 4)
    with pytest.raises(UserError, match="no biases or norms"):
        tune(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), [x], 1, progress=False)
    with pytest.raises(UserError, match="none left"):
        tune(nn.Linear(4, 4), nn.Linear(4, 4), iter([x]), 2, progress=False)
    with pytest.raises(UserError, match="not finite at step 2"):
        tune(nn.Linear(4, 4), nn.Linear(4, 4), [x, x * torch.inf], 5, progress=False)


# ---- Core ML packages ----


class Converted(nn.Module):
    """All that a converter may do to weights: leave them, make a linear layer a 1x1 convolution, cut them, transpose them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False)
        self.pointwise = nn.Linear(32, 48)
        self.cut = nn.Linear(48, 64, bias=False)
        self.turned = nn.Linear(64, 40, bias=False)
        self.zeros = nn.Linear(40, 32)
        self.linear = nn.Linear(32, 24)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x):
        h = self.depthwise(self.conv(x))
        h = nn.functional.conv2d(h, self.pointwise.weight[:, :, None, None], self.pointwise.bias)
        h = h.flatten(2).transpose(1, 2)
        h = torch.cat([nn.functional.linear(h, part) for part in self.cut.weight.chunk(2)], dim=-1)
        h = torch.matmul(h, self.turned.weight.T.clone()[None])
        return self.linear(torch.nn.functional.gelu(self.zeros(h)))


PLAN = {"conv": 4, "depthwise": 8, "pointwise": 6, "cut": 4, "turned": 4, "zeros": 4, "linear": 8}


def convert(module, target="iOS17"):
    ct = pytest.importorskip("coremltools")
    program = torch.export.export(module.eval(), (torch.randn(1, 8, 6, 6),)).run_decompositions({})
    return ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target[target], skip_model_load=True)


def stored_weights(folder):
    """{name: (values, indices, the op's own decompression)} of a saved package's constexpr_lut_to_dense ops, unpacked by hand."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(folder), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    stored = {}
    for op in program.functions["main"].operations:
        if op.op_type == "constexpr_lut_to_dense":
            values, indices = op.lut.val.reshape(-1), op.indices.val
            if "shape" in op.inputs:  # before iOS18: bits from the lowest up, without gaps
                bits = len(values).bit_length() - 1
                flags = np.unpackbits(indices, bitorder="little")[: int(np.prod(op.shape.val)) * bits].reshape(-1, bits)
                indices = (flags << np.arange(bits)).sum(1).reshape(op.shape.val)
            stored[op.name] = values, indices, op.materialized_val_inference()
        else:
            assert op.op_type not in ("conv", "linear", "matmul") or op.inputs["weight" if "weight" in op.inputs else "y"].op.op_type != "const"
    return stored


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_the_package_holds_exactly_our_palettes_and_indices(target, tmp_path):
    module = Converted()
    palettes = palettize(module, PLAN)
    to_mlpackage(convert(module, target), palettes).save(str(tmp_path / "small.mlpackage"))
    stored = stored_weights(tmp_path / "small.mlpackage")
    expected = {name: [palette.indices] for name, palette in palettes.items()}
    expected["pointwise"] = [palettes["pointwise"].indices[:, :, None, None]]
    expected["cut"] = [palettes["cut"].indices[:32], palettes["cut"].indices[32:]]
    expected["turned"] = [palettes["turned"].indices.T[None], palettes["turned"].indices.T, palettes["turned"].indices]
    matched = []
    for values, indices, dense in stored.values():
        assert values.dtype == np.float16 and np.array_equal(values[indices], dense)
        owners = [name for name, palette in palettes.items() if np.array_equal(palette.values, values)]
        assert len(owners) == 1 and any(np.array_equal(part, indices) for part in expected[owners[0]])
        matched += owners
    assert sorted(matched) == sorted([*PLAN, "cut"])
    # The file has little beside what we count: 64 bytes or so of alignment and description for each tensor.
    size = (tmp_path / "small.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    counted = size_in_bytes(module, PLAN)
    assert counted < size < counted + 128 * 2 * (2 * len(stored) + 4)


def test_a_package_with_a_part_of_the_layers(tmp_path):
    module = Converted()
    palettes = palettize(module, PLAN)
    to_mlpackage(convert(module), palettes, ["conv", "cut"]).save(str(tmp_path / "part.mlpackage"))
    import coremltools as ct

    model = ct.models.MLModel(str(tmp_path / "part.mlpackage"), skip_model_load=True)
    dense = ct.optimize.coreml.get_weights_metadata(model, weight_threshold=600)
    assert {weight.val.size for weight in dense.values() if weight.val.dtype == np.float16} == {32 * 25, 32 * 48, 64 * 40, 40 * 32, 32 * 24}


def test_what_is_not_in_the_package_is_reported():
    unquantised, module = Converted(), Converted()
    palettes = palettize(module, PLAN | {"depthwise": 3, "linear": 5})
    model = convert(unquantised)
    with pytest.raises(UserError, match="no weights with the palettes of conv, cut: convert the module after"):
        to_mlpackage(model, palettes, ["conv", "cut", "zeros"])
    with pytest.raises(UserError, match="no palette of 1, 2, 4, 6, 8 bits for linear, other"):
        to_mlpackage(model, palettes, ["conv", "linear", "other"])


def test_weights_that_coremltools_skips_are_reported(monkeypatch):
    module = Converted()
    palettes, model = palettize(module, {"conv": 4}), convert(module)
    monkeypatch.setattr("coremltools.optimize.coreml.palettize_weights", lambda model, config: model)
    with pytest.raises(UserError, match="coremltools left .*conv_weight.* as they were"):
        to_mlpackage(model, palettes)


def test_without_coremltools(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UserError, match=r"pip install \"snapgen_core\[export\]\""):
        to_mlpackage(None, {})


def test_large_layers_are_recognised():
    """A quarter of a million weights in 16 bits, of which numpy's `unique` gives some twice."""
    coremltools = pytest.importorskip("coremltools")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(512, 512, 1)).eval()
    palettes = palettize(network, {"0": 8})
    exported = torch.export.export(network, (torch.randn(1, 512, 1, 8),)).run_decompositions({})
    model = coremltools.convert(exported, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS18, skip_model_load=True)
    spec = to_mlpackage(model, palettes).get_spec()
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    assert [op.type for op in block.operations if op.type.startswith("constexpr")] == ["constexpr_lut_to_dense"]
