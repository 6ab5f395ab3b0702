"""Replay of Core ML packages: whole networks, both precisions, compressed weights, traces, and what is wrong with a file."""

import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from mlprograms import FP16, FP32, IOS17, IOS18, converted, ct, given, mb, normal, saved, tools, whole
from mlprograms import quick_conversion  # noqa: F401
from torch import nn

from snapgen_core.errors import UserError
from snapgen_core.export.operations import OPERATIONS
from snapgen_core.export.replay import Port, Replay, first_difference, psnr_db, snr
from snapgen_core.unet.attention import AttentionOptions, Transformer

# What torch.export and coremltools say about each other's versions.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


# ----------------------------------------------------------------------------------------------------- whole networks


class Block(nn.Module):
    """A piece of everything: convolutions, GroupNorm, our transformer, an embedding, a time embedding."""

    def __init__(self):
        super().__init__()
        options = AttentionOptions(12, head_dim=8, kv_heads=1, ffn_ratio=2, qk_norm=True, rope_theta=100.0, norm_groups=4)
        self.tokens = nn.Embedding(20, 12)
        self.time = nn.Linear(8, 16)
        self.down = nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.transformer = Transformer(16, 1, True, options)
        nn.init.normal_(self.transformer.project_out.weight, std=0.2)
        self.up = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Upsample(scale_factor=2.0), nn.Conv2d(16, 3, 1))

    def forward(self, sample, timestep, ids):
        angles = timestep[:, None] * torch.exp(-torch.arange(4) / 2)
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.down(sample) + embedded[:, :, None, None]
        x = self.transformer(x, self.tokens(ids))
        return self.up(x).clamp(-1, 1), embedded


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    network = Block().eval()
    ids = torch.randint(0, 20, (2, 5), dtype=torch.int32)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0.5, 7.0]), "ids": ids}
    with torch.no_grad():
        return network, inputs, network(**inputs)


@pytest.mark.parametrize("target", [IOS17, IOS18], ids=str)
@pytest.mark.parametrize("stored, at_least", [(FP32, 95), (FP16, 55)], ids=["fp32", "fp16"])
def test_a_converted_network_replays_as_torch_computes_it(tmp_path, block, target, stored, at_least):
    network, inputs, wanted = block
    converted(network, tuple(inputs.values()), target, stored).save(str(tmp_path / "block.mlpackage"))
    exact, declared = (Replay(tmp_path / "block.mlpackage", precision) for precision in ("fp32", "fp16"))
    kept = torch.float16 if stored == FP16 else torch.float32
    assert exact.inputs == {name: Port(tuple(x.shape), x.dtype) for name, x in inputs.items()}
    assert list(exact.outputs.values()) == [Port((2, 3, 8, 8), kept), Port((2, 16), kept)]
    found, rounded = exact(**inputs), declared(**inputs)
    assert found.keys() == rounded.keys() == exact.outputs.keys()
    for one, other, reference in zip(found.values(), rounded.values(), wanted):
        assert one.dtype == torch.float32 and other.dtype == kept
        assert snr(reference, one) > at_least
        assert snr(reference, other) > at_least - 10
    kinds = [op_type for _, op_type, _ in exact.trace(**inputs)]
    assert ("scaled_dot_product_attention" in kinds) == (target == IOS18)


# ----------------------------------------------------------------------------------------------- compressed weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 32, 3), nn.SiLU(), nn.Conv2d(32, 64, 1), nn.Flatten(2), nn.Linear(16, 32))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    network, x = Small(), torch.randn(1, 4, 6, 6)
    return x, {target: converted(network, (x,), target, FP16) for target in (IOS17, IOS18)}


def palettized(model, **options):
    config = tools.OpPalettizerConfig(weight_threshold=0, **options)
    return tools.palettize_weights(model, tools.OptimizationConfig(config))


def quantized(model, **options):
    config = tools.OpLinearQuantizerConfig(weight_threshold=0, **options)
    return tools.linear_quantize_weights(model, tools.OptimizationConfig(config))


def pruned(model):
    config = tools.OpMagnitudePrunerConfig(weight_threshold=0, target_sparsity=0.5)
    return tools.prune_weights(model, tools.OptimizationConfig(config))


@pytest.mark.parametrize(
    "target, compress, options",
    [
        (IOS17, palettized, {"mode": "uniform", "nbits": 6}),
        (IOS17, palettized, {"mode": "kmeans", "nbits": 4}),
        (IOS18, palettized, {"mode": "uniform", "nbits": 4, "granularity": "per_grouped_channel", "group_size": 8}),
        (IOS18, palettized, {"mode": "kmeans", "nbits": 4, "cluster_dim": 2}),
        (IOS17, quantized, {}),
        (IOS18, quantized, {"dtype": "int4", "granularity": "per_block", "block_size": 4}),
        (IOS17, pruned, {}),
        (IOS18, pruned, {}),
    ],
)
def test_a_compressed_package_computes_with_the_decompressed_weights(tmp_path, small, target, compress, options):
    """Against the package in which coremltools has decompressed them, to fp16."""
    x, packages = small
    model = compress(packages[target], **options)
    model.save(str(tmp_path / "small.mlpackage"))
    tools.decompress_weights(model).save(str(tmp_path / "large.mlpackage"))
    few, many = Replay(tmp_path / "small.mlpackage"), Replay(tmp_path / "large.mlpackage")
    assert any(op_type.startswith("constexpr_") for _, op_type, _ in few.trace(x=x))
    assert not any(op_type.startswith("constexpr_") for _, op_type, _ in many.trace(x=x))
    (name,) = few.outputs
    assert snr(many(x=x)[name], few(x=x)[name]) > 66


# ----------------------------------------------------------------------------------------------------------- precision


def half(*numbers):
    return np.array(numbers, np.float16)


def both_precisions(folder, body, arrays):
    path = saved(folder, body, arrays)
    return [next(iter(Replay(path, precision)(**given(arrays)).values())).tolist() for precision in ("fp32", "fp16")]


def test_fp16_overflows_and_rounds_where_the_package_says_fp16(tmp_path):
    exact, rounded = both_precisions(tmp_path, lambda a: mb.square(x=a), [half(300, 2, 1e-4)])
    assert exact == pytest.approx([90000, 4, 1e-8], rel=1e-3) and rounded == [float("inf"), 4, 0]


def test_fp16_loses_small_differences(tmp_path):
    assert both_precisions(tmp_path, lambda a: mb.add(x=a, y=np.float16(1)), [half(2048, 8)]) == [[2049, 9], [2048, 9]]


def test_inside_an_operation_fp16_sums_in_fp32(tmp_path):
    """Summed up in fp16, ones stop at 2048, and the mean of large numbers is infinite."""
    ones = np.ones((1, 3000), np.float16)
    assert both_precisions(tmp_path, lambda a: mb.reduce_sum(x=a, axes=[1]), [ones]) == [[3000], [3000]]
    shutil.rmtree(tmp_path / "made.mlpackage")
    assert both_precisions(tmp_path, lambda a: mb.reduce_mean(x=a, axes=[1]), [60000 * ones]) == [[60000], [60000]]


def test_fp16_leaves_what_the_package_keeps_in_fp32(tmp_path):
    def body(a):
        return mb.cast(x=mb.square(x=mb.cast(x=a, dtype="fp32")), dtype="fp16"), mb.square(x=mb.cast(x=a, dtype="fp32"))

    path = saved(tmp_path, body, [half(300)])
    narrow, wide = Replay(path, "fp16")(a=torch.tensor([300.0])).values()
    assert narrow.tolist() == [float("inf")] and wide.tolist() == [90000] and wide.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- trace


def chain(a):
    for step in range(5):
        a = mb.add(x=a, y=float(step), name=f"step_{step}")
    first, second = mb.split(x=a, axis=0, num_splits=2, name="halves")
    return mb.mul(x=first, y=second, name="product")


def test_a_trace_names_every_output_in_order(tmp_path):
    x = torch.tensor([1.0, 2.0])
    seen = list(Replay(saved(tmp_path, chain, [x.numpy()])).trace(a=x))
    assert [(name, op_type) for name, op_type, _ in seen[:5]] == [(f"step_{i}", "add") for i in range(5)]
    assert [op_type for _, op_type, _ in seen[5:]] == ["split", "split", "mul"] and seen[-1][0] == "product"
    assert [value.tolist() for _, _, value in seen] == [[1, 2], [2, 3], [4, 5], [7, 8], [11, 12], [11], [12], [132]]


def test_values_are_let_go_after_their_last_use(tmp_path):
    x = torch.tensor([1.0, 2.0])
    alive, most = [], 0
    for _, _, value in Replay(saved(tmp_path, chain, [x.numpy()])).trace(a=x):
        alive.append(weakref.ref(value))
        del value
        most = max(most, sum(reference() is not None for reference in alive))
    assert most <= 3


def test_the_first_operation_that_leaves_fp16_is_named(tmp_path):
    def body(a):
        large = mb.square(x=mb.mul(x=a, y=np.float16(1), name="as_it_was"), name="too_large")
        return mb.real_div(x=a, y=mb.sqrt(x=large, name="follows"), name="last")

    path = saved(tmp_path, body, [half(300, 280)])
    x = torch.tensor([300.0, 280.0])
    found = first_difference(Replay(path).trace(a=x), Replay(path, "fp16").trace(a=x), threshold_db=40, worst=2)
    assert (found.first.name, found.first.op_type, found.first.snr_db) == ("too_large", "square", float("-inf"))
    assert [each.name for each in found.worst] == ["too_large", "follows"] and (found.compared, found.unmatched) == (4, 0)


def test_what_is_no_number_never_agrees(tmp_path):
    """An RMSNorm that divides by the largest element is NaN for a row of zeros, at any precision."""
    path = saved(tmp_path, lambda a: mb.real_div(x=a, y=mb.reduce_max(x=a, axes=[-1]), name="no_number"), [half(0, 0)])
    found = first_difference(*(Replay(path, precision).trace(a=torch.zeros(2)) for precision in ("fp32", "fp16")))
    assert found.first.name == "no_number"


def test_constants_and_inputs_may_be_outputs(tmp_path):
    path = saved(tmp_path, lambda a: (mb.const(val=half(1, 2), name="fixed"), mb.identity(x=a, name="passed")), [half(3)])
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        found = Replay(path, precision)(a=torch.tensor([3.0]))
        assert [x.tolist() for x in found.values()] == [[1, 2], [3]] and {x.dtype for x in found.values()} == {dtype}


def test_traces_are_paired_by_name():
    one, two = torch.ones(2), torch.tensor([1.0, 1.1])
    a = [("x", "add", one), ("only_a", "mul", one), ("y", "add", one), ("z", "mul", one)]
    b = [("only_b", "cast", one), ("y", "add", two), ("x", "add", one), ("z", "mul", 3 * one)]
    found = first_difference(iter(a), iter(b), threshold_db=30)
    assert found.first.name == "y" and found.first.snr_db == pytest.approx(10 * np.log10(2 / 0.01), rel=1e-5)
    assert [each.name for each in found.worst] == ["z", "y", "x"] and (found.compared, found.unmatched) == (3, 2)
    assert first_difference(a, a).first is None


def test_snr_and_psnr_by_hand():
    reference, value = torch.tensor([3.0, -1.0, 1.0, -3.0]), torch.tensor([3.0, -1.0, 1.0, -2.0])
    assert snr(reference, value) == pytest.approx(10 * np.log10(20 / 1))
    assert psnr_db(reference, value) == pytest.approx(10 * np.log10(6**2 / 0.25))
    assert snr(reference, reference) == psnr_db(reference, reference) == float("inf")
    nothing, infinite = torch.zeros(2), torch.tensor([float("inf"), 1.0])
    assert snr(nothing, nothing + 1) == psnr_db(nothing + 5, nothing) == float("-inf")
    assert snr(infinite, infinite) == float("inf") and snr(nothing, infinite) == snr(infinite, nothing + 1) == float("-inf")
    missing = torch.tensor([1.0, float("nan")])
    assert snr(missing, missing) == psnr_db(missing, missing) == snr(nothing, missing) == float("-inf")
    assert snr(torch.tensor([True, False]), torch.tensor([True, True])) == 0
    with pytest.raises(UserError, match="shapes differ"):
        snr(nothing, reference)


# ---------------------------------------------------------------------------------------------------- what may be wrong


@pytest.fixture
def package(tmp_path):
    table = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    return saved(tmp_path, lambda a, b: mb.add(x=mb.gather(x=table, indices=a, axis=0), y=b), [whole(3), normal(3, 4)])


RIGHT = {"a": torch.tensor([0, 1, 999]), "b": torch.zeros(3, 4)}
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


def test_right_inputs_of_any_width(package):
    (found,) = Replay(package)(a=RIGHT["a"], b=RIGHT["b"].double()).values()
    assert found[:, 0].tolist() == [0, 4, 3996]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"b": None}, "takes the inputs a, b, not a"),
        ({"c": torch.zeros(1)}, "takes the inputs a, b, not a, b, c"),
        ({"b": torch.zeros(3, 5)}, r"input b has shape \(3, 4\), not \(3, 5\)"),
        ({"b": torch.zeros(4)}, r"input b has shape \(3, 4\), not \(4,\)"),
        ({"a": torch.zeros(3)}, "input a takes integers"),
        ({"a": torch.tensor([0, 1, 1000])}, r"operation gather_\d+ \(gather\) failed"),
    ],
)
def test_wrong_inputs_are_named(package, wrong, message):
    inputs = {name: value for name, value in (RIGHT | wrong).items() if value is not None}
    replay = Replay(package)
    with pytest.raises(UserError, match=message):
        replay(**inputs)
    with pytest.raises(UserError, match=message):
        list(replay.trace(**inputs))


def test_an_unknown_operation_is_named(tmp_path):
    path = saved(tmp_path, lambda a: mb.local_response_norm(x=a, size=3, name="neighbours"), [normal(1, 4, 3, 3)])
    assert "local_response_norm" not in OPERATIONS
    with pytest.raises(UserError, match=rf"{path}: operation neighbours is of a type .*: local_response_norm"):
        Replay(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (WEIGHTS, None, "damaged or missing: Could not open"),
        (WEIGHTS, 1000, "damaged or missing"),
        (Path("Data", "com.apple.CoreML", "model.mlmodel"), None, "not a readable package"),
        (Path("Data", "com.apple.CoreML", "model.mlmodel"), 100, "not a readable package"),
        (Path("Manifest.json"), None, "not a readable package"),
    ],
)
def test_a_damaged_package_is_one_clear_error(package, name, content, message):
    """content: what is left of a file, in bytes; None: it is gone."""
    kept = b"" if content is None else (package / name).read_bytes()[:content]
    (package / name).unlink()
    if content is not None:
        (package / name).write_bytes(kept)
    with pytest.raises(UserError, match=message) as caught:
        Replay(package)
    assert "\n" not in str(caught.value) and str(package) in str(caught.value)


def test_what_is_no_package(tmp_path, package):
    with pytest.raises(UserError, match="nowhere.mlpackage: no such package"):
        Replay(tmp_path / "nowhere.mlpackage")
    with pytest.raises(UserError, match="precision 'int8': fp16 or fp32"):
        Replay(package, precision="int8")
    other = ct.proto.Model_pb2.Model(specificationVersion=4)
    other.neuralNetwork.SetInParent()
    ct.utils.save_spec(other, str(tmp_path / "old.mlpackage"))
    with pytest.raises(UserError, match="old.mlpackage: not an mlprogram"):
        Replay(tmp_path / "old.mlpackage")


def test_without_coremltools_the_way_to_it_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UserError, match=r'pip install "snapgen_core\[export\]"'):
        Replay(package)


def test_a_size_may_be_left_open(tmp_path):
    exported = torch.export.export(
        nn.Linear(3, 2), (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=8)},)
    ).run_decompositions({})
    rows = [ct.TensorType("input", shape=(ct.RangeDim(2, 8, default=4), 3))]
    options = {"minimum_deployment_target": IOS17, "skip_model_load": True}
    model = ct.convert(exported, convert_to="mlprogram", inputs=rows, **options)
    model.save(str(tmp_path / "open.mlpackage"))
    replay = Replay(tmp_path / "open.mlpackage")
    assert replay.inputs["input"].shape == (None, 3)
    (found,) = replay(input=torch.randn(7, 3)).values()
    assert found.shape == (7, 2)
    with pytest.raises(UserError, match=r"input has shape \('any', 3\), not \(7, 4\)"):
        replay(input=torch.randn(7, 4))
