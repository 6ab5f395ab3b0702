"""Every operation of mlprograms against numpy, against torch, or by hand, each in a saved package of its own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlprograms import IOS17, IOS18, close, mb, normal, positive, replayed, types, whole
from mlprograms import quick_conversion  # noqa: F401

# ------------------------------------------------------------------------------------- against MIL's numpy references


def unary(name, x, **parameters):
    return pytest.param(lambda a: getattr(mb, name)(x=a, **parameters), [x], id=name)


def binary(name, x, y):
    return pytest.param(lambda a, b: getattr(mb, name)(x=a, y=b), [x, y], id=f"{name}-{x.dtype}")


def logical(name):
    def body(a, b):
        return mb.cast(x=getattr(mb, name)(x=mb.greater(x=a, y=0.0), y=mb.greater(x=b, y=0.0)), dtype="int32")

    return pytest.param(body, [normal(3, 4), normal(4, seed=1)], id=name)


def case(name, body, *arrays):
    return pytest.param(body, list(arrays), id=name)


def product(equation, x, y):
    return case(equation, lambda a, b: mb.einsum(values=(a, b), equation=equation), x, y)


def as_numbers(truth):
    return mb.cast(x=truth, dtype="int32")


X, Y, NUMBERS = normal(2, 3, 4), normal(3, 1, seed=1), whole(2, 3, 4)
PLAIN = "abs exp exp2 erf sin cos tan tanh sinh cosh atan floor ceil round sign square relu relu6 sigmoid softplus softsign"
ARITHMETIC = "add sub mul real_div floor_div mod maximum minimum"
COMPARISONS = "equal not_equal greater greater_equal less less_equal"
REDUCTIONS = "mean sum prod max min l1_norm l2_norm sum_square log_sum log_sum_exp"

AGAINST_NUMPY = [
    *(unary(name, 2 * X) for name in PLAIN.split()),
    *(unary(name, positive(3, 4)) for name in ("sqrt", "log", "rsqrt", "inverse")),
    *(unary(name, np.tanh(X)) for name in ("asin", "acos", "atanh")),
    *(binary(name, X, Y) for name in ARITHMETIC.split()),
    *(binary(name, NUMBERS, whole(3, 1, low=1, seed=1)) for name in ARITHMETIC.split() if name != "real_div"),
    binary("pow", positive(2, 3), normal(3, seed=1)),
    *(
        case(name, lambda a, b, name=name: as_numbers(getattr(mb, name)(x=a, y=b)), NUMBERS, whole(3, 4, seed=1))
        for name in COMPARISONS.split()
    ),
    *(logical(name) for name in ("logical_and", "logical_or", "logical_xor")),
    case("logical_not", lambda a: as_numbers(mb.logical_not(x=mb.greater(x=a, y=0.0))), X),
    case("select", lambda a, b: mb.select(cond=mb.greater(x=a, y=0.0), a=a, b=b), X, Y),
    case("cast-float-to-int", lambda a: mb.cast(x=a, dtype="int32"), 3 * X),
    case("cast-int-to-float", lambda a: mb.cast(x=a, dtype="fp32"), NUMBERS),
    case("cast-float-to-bool", lambda a: as_numbers(mb.cast(x=a, dtype="bool")), np.array([0, 0.5, -2], np.float32)),
    case("identity", lambda a: mb.identity(x=a), X),
    unary("clip", X, alpha=-0.5, beta=0.25),
    unary("threshold", X, alpha=0.25),
    unary("leaky_relu", X, alpha=0.1),
    unary("prelu", normal(2, 3, 2, 2), alpha=np.array([0.1, 0.2, 0.3], np.float32)),
    unary("elu", X, alpha=1.5),
    unary("sigmoid_hard", X, alpha=0.4, beta=0.3),
    unary("linear_activation", X, alpha=2.0, beta=-1.0),
    unary("scaled_tanh", X, alpha=2.0, beta=0.5),
    *(unary("gelu", 2 * X, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    *(unary("softmax", X, axis=axis) for axis in (-1, 1)),
    *(unary(f"reduce_{kind}", positive(2, 3, 4), axes=[0, -1], keep_dims=True) for kind in REDUCTIONS.split()),
    *(unary(f"reduce_{kind}", positive(2, 3, 4), axes=[1], keep_dims=False) for kind in REDUCTIONS.split()),
    unary("reduce_sum", NUMBERS, axes=[1], keep_dims=False),
    case("reduce_sum-all", lambda a: mb.expand_dims(x=mb.reduce_sum(x=a), axes=[0]), X),
    unary("reduce_argmax", X, axis=1, keep_dims=False),
    unary("reduce_argmin", X, axis=-1, keep_dims=True),
    unary("cumsum", X, axis=1),
    unary("cumsum", X, axis=2, reverse=True),
    binary("matmul", normal(2, 1, 3, 4), normal(5, 4, 2, seed=1)),
    case(
        "matmul-transposed",
        lambda a, b: mb.matmul(x=a, y=b, transpose_x=True, transpose_y=True),
        *(normal(2, 4, 3), normal(2, 5, 4)),
    ),
    unary("linear", X, weight=normal(5, 4, seed=1), bias=normal(5, seed=2)),
    unary("linear", X, weight=normal(5, 4, seed=1)),
    product("nchw,nwhu->nchu", normal(2, 4, 1, 5), normal(2, 5, 3, 6)),
    product("bkhc,bchq->bkhq", normal(2, 6, 3, 4), normal(2, 4, 3, 5)),
    product("chw,whr->chr", normal(4, 3, 5), normal(5, 3, 6)),
    unary("layer_norm", normal(2, 3, 4, 5), axes=[1, -1], gamma=normal(3, 5), beta=normal(3, 5, seed=2), epsilon=1e-3),
    unary("layer_norm", X, axes=[-1]),
    unary("l2_norm", normal(2, 3, 4, 5)),
    unary("reshape", X, shape=[3, -1, 4]),
    unary("reshape", X, shape=[1, 0, -1, 0]),
    unary("transpose", X, perm=[-1, 0, 1]),
    unary("expand_dims", X, axes=[0, -1]),
    unary("squeeze", normal(1, 3, 1, 2), axes=[0]),
    unary("squeeze", normal(1, 3, 1, 2)),
    case("concat", lambda a, b: mb.concat(values=(a, b), axis=-2), X, normal(2, 1, 4)),
    case("stack", lambda a, b: mb.stack(values=(a, b), axis=1), X, X + 1),
    case("split", lambda a: mb.split(x=a, axis=2, num_splits=2), X),
    case("split-sizes", lambda a: mb.split(x=a, axis=-1, split_sizes=[1, 3]), X),
    unary("tile", X, reps=[2, 1, 3]),
    unary("reverse", X, axes=[0, 2]),
    unary("slice_by_index", X, begin=[0, -2, 3], end=[1, 3, 0], stride=[1, 1, -2]),
    unary("slice_by_index", X, begin=[1, 1, 3], end=[0, 0, -1], begin_mask=[False, False, True], end_mask=[True] * 2 + [False]),
    unary("slice_by_index", X, begin=[1, -1, 1], end=[0, 0, 4], squeeze_mask=[True, True, False], stride=[1, 1, 2]),
    unary("slice_by_index", X, begin=[0, 0, 9], end=[0, 9, -9], stride=[1, 2, -1], end_mask=[True, False, True]),
    unary("slice_by_size", X, begin=[0, 1, -3], size=[-1, 2, 2]),
    unary("pad", X, pad=[0, 2, 1, 0], mode="constant", constant_val=3.0),
    unary("pad", X, pad=[1, 2, 3, 0], mode="reflect"),
    unary("pad", X, pad=[1, 2, 3, 0], mode="replicate"),
    case("gather", lambda a, b: mb.gather(x=a, indices=b, axis=1), X, whole(2, 2, low=-3, high=3)),
    case("gather-batch", lambda a, b: mb.gather(x=a, indices=b, axis=2, batch_dims=1), X, whole(2, 5, low=0, high=4)),
    case("gather-one", lambda a: mb.gather(x=a, indices=2, axis=-2), X),
    case("gather_along_axis", lambda a, b: mb.gather_along_axis(x=a, indices=b, axis=1), X, whole(2, 5, 4, low=-3, high=3)),
    *(unary("band_part", normal(4, 5), lower=lower, upper=upper) for lower, upper in ((-1, 0), (1, -1), (0, 2))),
    case("range_1d", lambda a: mb.range_1d(start=mb.reduce_max(x=a), end=20, step=3), np.array([1, 4], np.int32)),
    case("range_1d-float", lambda a: mb.add(x=a, y=mb.range_1d(start=0.0, end=1.0, step=0.3)), normal(4)),
    case("fill", lambda a: mb.add(x=a, y=mb.fill(shape=[3, 4], value=2.5)), X),
    case("fill_like", lambda a: mb.fill_like(ref_tensor=a, value=2.5), X),
    case("shape", lambda a: mb.add(x=a, y=mb.shape(x=a)), whole(3)),
    unary("argsort", X, axis=1),
    unary("argsort", X, axis=-1, ascending=True),
    unary("topk", X, k=2, axis=2),
    unary("topk", X, k=2, axis=1, ascending=True),
]


@pytest.mark.parametrize("body, arrays", AGAINST_NUMPY)
def test_an_operation_equals_its_numpy_reference(tmp_path, body, arrays):
    """On constants, coremltools computes an operation itself, with numpy, while it builds the program."""
    wanted = []

    def on_constants(a):
        found = body(*arrays)
        wanted.extend(each.val for each in (found if isinstance(found, (tuple, list)) else [found]))
        return mb.identity(x=a)

    mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=IOS17)(on_constants)
    found = replayed(tmp_path, body, arrays)
    assert len(found) == len(wanted) and not any(value is None for value in wanted)
    for one, other in zip(found, wanted):
        close(one, other)


# ------------------------------------------------------------------------------------------------------ against torch


def layer(name, reference, x, variant="", **parameters):
    """mb.NAME(x=x, **parameters) is to equal reference(x)."""
    return pytest.param(lambda a: getattr(mb, name)(x=a, **parameters), reference, [x], IOS17, id=name + variant)


def against(name, body, reference, *arrays, target=IOS17):
    return pytest.param(body, reference, list(arrays), target, id=name)


def resized(mode, **options):
    return lambda x: F.interpolate(x, mode=mode, **options)


def read_at(*points):
    """What linear interpolation reads at `points` of a line (1, 1, 1, W)."""
    return lambda x: torch.tensor(np.interp(points, np.arange(x.shape[-1]), x.flatten().numpy())).reshape(1, 1, 1, -1)


T = torch.from_numpy
IMAGE, LINE, VOLUME = normal(2, 4, 7, 6), normal(2, 4, 9), normal(1, 2, 4, 5, 3)
KERNEL, EVEN, DEPTHWISE = normal(6, 4, 3, 3, seed=1), normal(6, 4, 2, 4, seed=5), normal(8, 1, 3, 2, seed=3)
KERNEL_1D, KERNEL_3D = normal(6, 4, 3, seed=6), normal(3, 2, 2, 2, 2, seed=7)
BACK, BACK_1D = normal(4, 5, 3, 3, seed=4), normal(4, 5, 3, seed=8)
BIAS, BIAS_BACK, MEAN, GAMMA, BETA = (normal(n, seed=n) for n in (6, 5, 4, 4, 4))
AROUND, TWICE = {"pad_type": "custom", "pad": [1, 1, 1, 1]}, {"strides": [2, 2]}

CONVOLUTIONS = [
    layer("conv", lambda x: F.conv2d(x, T(KERNEL), T(BIAS), 2, 1), IMAGE, weight=KERNEL, bias=BIAS, **AROUND, **TWICE),
    layer("conv", lambda x: F.conv2d(x, T(KERNEL), dilation=(1, 2)), IMAGE, "-valid", weight=KERNEL, dilations=[1, 2]),
    layer("conv", lambda x: F.conv2d(x, T(DEPTHWISE), groups=4), IMAGE, "-grouped", weight=DEPTHWISE, groups=4),
    layer("conv", lambda x: F.conv1d(x, T(KERNEL_1D), padding=1), LINE, "-1d", weight=KERNEL_1D, pad_type="same"),
    layer("conv", lambda x: F.conv3d(x, T(KERNEL_3D)), VOLUME, "-3d", weight=KERNEL_3D),
    layer(
        "conv",
        lambda x: F.conv2d(F.pad(x, (0, 2, 1, 0)), T(KERNEL)),
        IMAGE,
        "-lopsided",
        weight=KERNEL,
        pad_type="custom",
        pad=[1, 0, 0, 2],
    ),
    layer("conv", lambda x: F.conv2d(F.pad(x, (1, 2, 0, 1)), T(EVEN)), IMAGE, "-same", weight=EVEN, pad_type="same"),
    layer("conv", lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), T(EVEN)), IMAGE, "-lower", weight=EVEN, pad_type="same_lower"),
    layer(
        "conv",
        lambda x: F.conv2d(F.pad(x, (0, 1, 1, 1)), T(KERNEL), stride=2),
        IMAGE,
        "-same-strided",
        weight=KERNEL,
        pad_type="same",
        **TWICE,
    ),
    against("conv-computed-weight", lambda a, b: mb.conv(x=a, weight=b), F.conv2d, IMAGE, KERNEL),
    layer(
        "conv_transpose",
        lambda x: F.conv_transpose2d(x, T(BACK), T(BIAS_BACK), 2, 1),
        IMAGE,
        weight=BACK,
        bias=BIAS_BACK,
        **AROUND,
        **TWICE,
    ),
    layer(
        "conv_transpose",
        lambda x: F.conv_transpose2d(x, T(BACK), T(BIAS_BACK), 2, 1, output_padding=1),
        IMAGE,
        "-sized",
        weight=BACK,
        bias=BIAS_BACK,
        output_shape=[2, 5, 14, 12],
        **AROUND,
        **TWICE,
    ),
    layer(
        "conv_transpose",
        lambda x: F.conv_transpose2d(x, T(BACK), stride=(1, 2), dilation=(2, 1)),
        IMAGE,
        "-valid",
        weight=BACK,
        strides=[1, 2],
        dilations=[2, 1],
    ),
    layer("conv_transpose", lambda x: F.conv_transpose2d(x, T(BACK), groups=2), IMAGE, "-grouped", weight=BACK, groups=2),
    layer(
        "conv_transpose",
        lambda x: F.conv_transpose2d(x, T(BACK), stride=2)[..., :14, :12],
        IMAGE,
        "-same",
        weight=BACK,
        pad_type="same",
        **TWICE,
    ),
    layer("conv_transpose", lambda x: F.conv_transpose1d(x, T(BACK_1D), stride=3), LINE, "-1d", weight=BACK_1D, strides=[3]),
]

QUERY, KEY, VALUE, MASK = normal(2, 3, 5, 8), normal(2, 3, 7, 8, seed=1), normal(2, 3, 7, 6, seed=2), normal(5, 5, seed=3)


def self_attention(mask):
    return lambda a, b: F.scaled_dot_product_attention(a, a, a, mask(b))


LAYERS = [
    layer("silu", F.silu, X),
    layer(
        "batch_norm",
        lambda x: F.batch_norm(x, T(MEAN), T(MEAN**2), T(GAMMA), T(BETA)),
        IMAGE,
        mean=MEAN,
        variance=MEAN**2,
        gamma=GAMMA,
        beta=BETA,
        epsilon=1e-5,
    ),
    layer(
        "instance_norm",
        lambda x: F.instance_norm(x, weight=T(GAMMA), bias=T(BETA)),
        IMAGE,
        gamma=GAMMA,
        beta=BETA,
        epsilon=1e-5,
    ),
    layer("instance_norm", F.instance_norm, LINE, "-1d", epsilon=1e-5),
    against(
        "attention",
        lambda a, b, c: mb.scaled_dot_product_attention(query=a, key=b, value=c),
        F.scaled_dot_product_attention,
        *(QUERY, KEY, VALUE),
        target=IOS18,
    ),
    against(
        "attention-mask",
        lambda a, b: mb.scaled_dot_product_attention(query=a, key=a, value=a, attn_mask=b),
        self_attention(lambda b: b),
        *(QUERY, MASK),
        target=IOS18,
    ),
    against(
        "attention-where",
        lambda a, b: mb.scaled_dot_product_attention(query=a, key=a, value=a, attn_mask=mb.greater(x=b, y=-0.5)),
        self_attention(lambda b: b > -0.5),
        *(QUERY, MASK),
        target=IOS18,
    ),
]

POOLING = [
    layer("avg_pool", lambda x: F.avg_pool2d(x, (3, 2), 2, 1), IMAGE, kernel_sizes=[3, 2], **AROUND, **TWICE),
    layer(
        "avg_pool",
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        IMAGE,
        "-ceil",
        kernel_sizes=[3, 3],
        ceil_mode=True,
        **AROUND,
        **TWICE,
    ),
    layer(
        "avg_pool",
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        IMAGE,
        "-without-pads",
        kernel_sizes=[3, 3],
        pad_type="same",
        exclude_padding_from_average=True,
    ),
    layer("avg_pool", lambda x: F.avg_pool1d(x, 2), LINE, "-1d", kernel_sizes=[2], strides=[2], pad_type="valid"),
    layer("max_pool", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE - 5, kernel_sizes=[3, 3], **AROUND, **TWICE),
    layer(
        "max_pool",
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        IMAGE - 5,
        "-ceil",
        kernel_sizes=[2, 2],
        pad_type="valid",
        ceil_mode=True,
        **TWICE,
    ),
]


def nearest(variant, reference, height, width):
    parameters = {"scale_factor_height": height, "scale_factor_width": width}
    return layer("upsample_nearest_neighbor", reference, IMAGE, variant, **parameters)


def bilinear(variant, reference, factor, corners):
    parameters = {"scale_factor_height": factor, "scale_factor_width": factor, "align_corners": corners}
    return layer("upsample_bilinear", reference, IMAGE, variant, **parameters)


def resize_bilinear(mode, reference, x, height, width):
    parameters = {"target_size_height": height, "target_size_width": width, "sampling_mode": mode}
    return layer("resize_bilinear", reference, x, f"-{mode}", **parameters)


def resize(mode, reference, **parameters):
    return layer("resize", reference, IMAGE, f"-{mode}", resized_dims=np.uint32(2), interpolation_mode=mode, **parameters)


PAIR, FIVE = normal(1, 1, 1, 2), normal(1, 1, 1, 5)

RESIZING = [
    nearest("", resized("nearest", scale_factor=(2.0, 3.0)), 2, 3),
    nearest("-fraction", resized("nearest", size=(10, 9)), 10 / 7 + 1e-4, 1.5),
    layer("resize_nearest_neighbor", resized("nearest", size=(3, 11)), IMAGE, target_size_height=3, target_size_width=11),
    bilinear("", resized("bilinear", scale_factor=2.0), 2, False),
    bilinear("-corners", resized("bilinear", scale_factor=3.0, align_corners=True), 3, True),
    resize_bilinear("UNALIGN_CORNERS", resized("bilinear", size=(5, 13)), IMAGE, 5, 13),
    resize_bilinear("STRICT_ALIGN_CORNERS", resized("bilinear", size=(5, 13), align_corners=True), IMAGE, 5, 13),
    resize_bilinear("DEFAULT", read_at(0, 0.4, 0.8, 1, 1), PAIR, 1, 5),  # these three as the documentation counts them
    resize_bilinear("OFFSET_CORNERS", read_at(0.1, 0.3, 0.5, 0.7, 0.9), PAIR, 1, 5),
    resize_bilinear("ALIGN_CORNERS", read_at(2), FIVE, 1, 1),
    resize("LINEAR", resized("bilinear", size=(14, 9)), shape=[4, 14, 9], sampling_mode="UNALIGN_CORNERS"),
    resize("NEAREST_NEIGHBOR", resized("nearest", size=(14, 6)), shape=[14, 0]),
    layer("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE, upscale_factor=2),
    layer("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), normal(1, 3, 4, 6), downscale_factor=np.uint32(2)),
    layer("crop", lambda x: x[..., 1:-2, 3:], IMAGE, crop_height=[1, 2], crop_width=[3, 0]),
]


def updated_backwards(x, update):
    x = x.clone()
    x[:, [2, 1], 1:3] = update
    return x


PLACES = [
    layer("cumsum", lambda x: x.cumsum(1) - x, X, "-exclusive", axis=1, exclusive=True),
    layer("cumsum", lambda x: x.flip(1).cumsum(1).flip(1) - x, X, "-before", axis=1, exclusive=True, reverse=True),
    against(
        "one_hot",
        lambda a: mb.one_hot(indices=a, one_hot_vector_size=5),
        lambda a: F.one_hot(a.long(), 5),
        whole(2, 3, low=0, high=5),
    ),
    against(
        "one_hot-axis",
        lambda a: mb.one_hot(indices=a, one_hot_vector_size=5, axis=1, on_value=2.0, off_value=-1.0),
        lambda a: F.one_hot(a.long(), 5).movedim(-1, 1) * 3 - 1,
        whole(2, 3, low=0, high=5),
    ),
    against(
        "concat-interleave",
        lambda a, b: mb.concat(values=(a, b), axis=1, interleave=True),
        lambda a, b: torch.stack([a, b], 2).flatten(1, 2),
        *(X, X + 1),
    ),
    against(
        "gather_nd",
        lambda a, b: mb.gather_nd(x=a, indices=b),
        lambda a, b: a[b[:, 0], b[:, 1]],
        *(X, whole(5, 2, low=0, high=2)),
    ),
    against(
        "gather_nd-batch",
        lambda a, b: mb.gather_nd(x=a, indices=b, batch_dims=1),
        lambda a, b: torch.stack([a[0, b[0, :, 0]], a[1, b[1, :, 0]]]),
        *(X, whole(2, 5, 1, low=0, high=3)),
    ),
    against(
        "scatter",
        lambda a, b, c: mb.scatter(data=a, indices=b, updates=c, axis=1, mode="add"),
        lambda a, b, c: a.index_add(1, b, c),
        *(X, np.array([0, 2, 2, 0], np.int32), normal(2, 4, 4)),
    ),
    against(
        "scatter_nd",
        lambda a, b, c: mb.scatter_nd(data=a, indices=b, updates=c, mode="update"),
        lambda a, b, c: a.index_put((b[:, 0].long(), b[:, 1].long()), c),
        *(X, np.array([[0, 1], [1, 2]], np.int32), normal(2, 4)),
    ),
    against(
        "scatter_along_axis",
        lambda a, b, c: mb.scatter_along_axis(data=a, indices=b, updates=c, axis=2, mode="max"),
        lambda a, b, c: a.scatter_reduce(2, b.long(), c, "amax"),
        *(X, whole(2, 3, 5, low=0, high=4), normal(2, 3, 5)),
    ),
    against(
        "slice_update",
        lambda a, b: mb.slice_update(
            x=a, update=b, begin=[0, 2, 1], end=[0, 0, 3], stride=[1, -1, 1], end_mask=[True, False, False]
        ),
        updated_backwards,
        *(X, normal(2, 2, 2)),
        target=IOS18,
    ),
    against("non_zero", lambda a: mb.non_zero(x=mb.greater(x=a, y=0.0)), lambda a: (a > 0).nonzero(), X),
]


@pytest.mark.parametrize("body, reference, arrays, target", CONVOLUTIONS + LAYERS + POOLING + RESIZING + PLACES)
def test_an_operation_equals_torch(tmp_path, body, reference, arrays, target):
    (found,) = replayed(tmp_path, body, arrays, target)
    close(found, reference(*map(T, arrays)))


# -------------------------------------------------------------------------------------------- compressed weights, by hand


def packed(numbers, bits):
    """Numbers of `bits` bits end to end, from the lowest bit of the first byte."""
    stream = sum(int(n) << (place * bits) for place, n in enumerate(numbers))
    return np.frombuffer(stream.to_bytes(-(-len(numbers) * bits // 8), "little"), np.uint8)


def narrow(x):
    """In four bits, or one: the dtypes of iOS18's operations."""
    return x.astype(types.np_uint1_dtype if x.max() == 1 else types.np_int4_dtype if x.min() < 0 else types.np_uint4_dtype)


def every_element(rule):
    return [[rule(i, j) for j in range(6)] for i in range(4)]


CODES, SIZES = whole(4, 6, low=0, high=16), np.array([4, 6], np.uint32)
KEPT = (normal(4, 6) > 0.3).astype(np.uint8)
FEW, FEW_CODES = normal(KEPT.sum(), seed=1), whole(KEPT.sum(), low=-8, high=8)
SPARSE, SPARSE_CODES = np.zeros((4, 6)), np.zeros((4, 6))
SPARSE[KEPT == 1], SPARSE_CODES[KEPT == 1] = FEW, FEW_CODES
PALETTE, VECTORS = normal(64, seed=1), normal(1, 1, 16, 3, seed=1)
TABLES = normal(2, 3, 16, 1, seed=1)  # a table of 16 numbers for every block of 2 x 2
ROUGH = (8 * TABLES).astype(np.int8)
SCALE, OFFSET = positive(2, 3), whole(2, 3)
SCALES, OFFSETS = (np.kron(x, np.ones((2, 2))) for x in (SCALE, OFFSET))


def palette(bits):
    codes = CODES % 2**bits

    def weight():
        return mb.constexpr_lut_to_dense(indices=packed(codes.flatten(), bits), lut=PALETTE[: 2**bits], shape=SIZES)

    return pytest.param(IOS17, weight, PALETTE[codes], id=f"palette-{bits}-bits")


def compressed(name, target, weight, wanted):
    return pytest.param(target, weight, wanted, id=name)


COMPRESSED = [
    *(palette(bits) for bits in (1, 2, 4, 6)),
    compressed(
        "sparse",
        IOS17,
        lambda: mb.constexpr_sparse_to_dense(nonzero_data=FEW, mask=packed(KEPT.flatten(), 1), shape=SIZES),
        SPARSE,
    ),
    compressed(
        "affine",
        IOS17,
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=CODES.astype(np.uint8), zero_point=np.arange(4).astype(np.uint8), scale=positive(4), axis=0
        ),
        positive(4)[:, None] * (CODES - np.arange(4)[:, None]),
    ),
    compressed(
        "cast",
        IOS17,
        lambda: mb.constexpr_cast(source_val=SPARSE.astype(np.float16), output_dtype="fp32"),
        SPARSE.astype(np.float16),
    ),
    compressed(
        "palettes-iOS18",
        IOS18,
        lambda: mb.constexpr_lut_to_dense(indices=narrow(CODES), lut=TABLES),
        every_element(lambda i, j: TABLES[i // 2, j // 2, CODES[i, j], 0]),
    ),
    compressed(
        "palette-of-vectors-iOS18",
        IOS18,
        lambda: mb.constexpr_lut_to_dense(indices=narrow(CODES[:, :2]), lut=VECTORS, vector_axis=1),
        every_element(lambda i, j: VECTORS[0, 0, CODES[i, j // 3], j % 3]),
    ),
    compressed(
        "palettes-in-int8-iOS18",
        IOS18,
        lambda: mb.constexpr_blockwise_shift_scale(
            data=mb.constexpr_lut_to_dense(indices=narrow(CODES), lut=ROUGH), scale=SCALE
        ),
        every_element(lambda i, j: ROUGH[i // 2, j // 2, CODES[i, j], 0] * SCALE[i // 2, j // 2]),
    ),
    compressed(
        "blocks-iOS18",
        IOS18,
        lambda: mb.constexpr_blockwise_shift_scale(data=narrow(CODES - 8), scale=SCALE, offset=narrow(OFFSET)),
        SCALES * (CODES - 8 - OFFSETS),
    ),
    compressed(
        "sparse-iOS18",
        IOS18,
        lambda: mb.constexpr_sparse_to_dense(nonzero_data=FEW, mask=narrow(KEPT)),
        SPARSE,
    ),
    compressed(
        "sparse-palette-iOS18",
        IOS18,
        lambda: sparse(
            mb.constexpr_lut_to_sparse(
                indices_mask=narrow(KEPT), indices_nonzero_data=narrow(FEW_CODES + 8), lut=PALETTE[:16].reshape(1, 1, 16, 1)
            )
        ),
        KEPT * PALETTE[(SPARSE_CODES + 8).astype(int)],
    ),
    compressed(
        "sparse-blocks-iOS18",
        IOS18,
        lambda: sparse(
            mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=narrow(KEPT), nonzero_data=narrow(FEW_CODES), scale=SCALE, offset=narrow(OFFSET)
            )
        ),
        KEPT * SCALES * (SPARSE_CODES - OFFSETS),
    ),
]


def sparse(mask_and_data):
    mask, data = mask_and_data
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


@pytest.mark.parametrize("target, weight, wanted", COMPRESSED)
def test_compressed_weights(tmp_path, target, weight, wanted):
    (found,) = replayed(tmp_path, lambda a: mb.add(x=a, y=weight()), [np.zeros((4, 6), np.float32)], target)
    close(found, wanted)
