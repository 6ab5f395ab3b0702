"""SnapGenUNet against the paper's figures (on meta tensors) and against independent references (on small networks)."""

import inspect
from dataclasses import asdict, fields, replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from snapgen_core.errors import UserError
from snapgen_core.profile import count_macs, count_parameters
from snapgen_core.scales import UNET_PRESETS, UNetPreset, get_scale
from snapgen_core.unet import SnapGenUNet
from snapgen_core.unet import attention as attention_module
from snapgen_core.unet.attention import Attention, AttentionOptions, FeedForward, Rope2d, rotate
from snapgen_core.unet.blocks import ResidualBlock, conv3x3
from snapgen_core.unet.network import timestep_embedding

SMALL = UNetPreset(
    in_channels=4,
    out_channels=4,
    context_dim=24,
    channels=(32, 64, 96),
    transformer_depth=(1, 1, 2),
    head_dim=16,
    time_embed_dim=32,
)
# Two stages, one block each: for what takes long.
SMALLEST = replace(
    SMALL,
    channels=(32, 64),
    transformer_depth=(1, 1),
    layers_per_block=1,
    self_attention=(False, True),
    residual_blocks=(False, True),
)


def small_unet(preset: UNetPreset = SMALL, **changes) -> SnapGenUNet:
    """A network with no weight at zero, so that every part of it shows in the output."""
    torch.manual_seed(0)
    unet = SnapGenUNet(**asdict(replace(preset, **changes)))
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    return unet


def inputs(batch: int = 2, height: int = 8, width: int = 8):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    return sample, torch.rand(batch, generator=generator) * 1000, torch.randn(batch, 7, 24, generator=generator)


# --- the paper's figures ---------------------------------------------------------------------------------------------


@lru_cache
def cost(preset: str, size: int, tokens: int = 77) -> tuple[float, float]:
    """Parameters in millions and MACs in billions."""
    config = UNET_PRESETS[preset]
    with torch.device("meta"):
        unet = SnapGenUNet.from_preset(preset)
        sample = torch.empty(1, config.in_channels, size, size)
        macs = count_macs(unet, sample, torch.empty(1), torch.empty(1, tokens, config.context_dim))
    return count_parameters(unet) / 1e6, macs / 1e9


def test_final_model_on_imagenet_has_372_m_parameters_and_38_gmacs():
    params, macs = cost("paper-imagenet", 32)
    assert params == pytest.approx(372, rel=0.01)
    assert macs == pytest.approx(38, rel=0.03)


def test_text_to_image_model_has_379_m_parameters():
    with torch.device("meta"):
        assert count_parameters(SnapGenUNet.from_preset("paper")) / 1e6 == pytest.approx(379, rel=0.01)


@pytest.mark.parametrize(
    "step, before, params, macs",
    [
        ("b", "a", None, -17),
        ("c0", "b", -24, None),
        ("c", "b", -15, -27),
        ("d", "c", -12, -12),
        ("e", "d", -16, -6),
        ("g", "f", 0, 0),  # "negligible computational and parameter overhead"
    ],
)
def test_ablation_step_changes_cost_as_published(step, before, params, macs):
    new, old = cost(f"ablation-{step}", 128), cost(f"ablation-{before}", 128)
    if params is not None:
        assert 100 * (new[0] / old[0] - 1) == pytest.approx(params, abs=3)
    if macs is not None:
        assert 100 * (new[1] / old[1] - 1) == pytest.approx(macs, abs=3)


def test_text_in_the_first_stage_costs_next_to_nothing():
    new, old = cost("ablation-f", 128), cost("ablation-e", 128)
    assert new[0] / old[0] == pytest.approx(1, abs=0.01)
    assert new[1] / old[1] == pytest.approx(1, abs=0.03)


def test_baseline_costs_exactly_what_the_same_sdxl_unet_of_diffusers_does():
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            in_channels=8,
            out_channels=8,
            block_out_channels=(256, 512, 896),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
            attention_head_dim=(4, 8, 14),
            cross_attention_dim=768,
            use_linear_projection=True,
        )
        macs = count_macs(sdxl, torch.empty(1, 8, 32, 32), torch.empty(1), torch.empty(1, 77, 768))
    assert cost("ablation-a", 32) == (count_parameters(sdxl) / 1e6, macs / 1e9)


def test_tiny_ships_in_16_bits_under_16_mb_and_fits_its_scale():
    unet, scale = SnapGenUNet.from_preset("tiny"), get_scale("tiny")
    assert 2 * count_parameters(unet) < 15.9e6
    assert (unet.config.in_channels, unet.config.context_dim) == (scale.latent_channels, scale.context_dim)
    sample = torch.randn(2, scale.latent_channels, scale.latent_size, scale.latent_size)
    context = torch.randn(2, scale.clip_tokens + scale.lm_tokens, scale.context_dim)
    assert unet(sample, torch.tensor([0.0, 1000.0]), context).sample.shape == sample.shape


def test_small_has_about_120_m_parameters():
    with torch.device("meta"):
        assert count_parameters(SnapGenUNet.from_preset("small")) / 1e6 == pytest.approx(120, rel=0.05)


# --- the switches ----------------------------------------------------------------------------------------------------


def stages_with(unet: SnapGenUNet, kind: type | str) -> set[int]:
    """Stages, 0 the finest, that hold a module of this type, or with this last name."""
    found, last = set(), len(unet.config.channels) - 1
    for name, module in unet.named_modules():
        if (name.split(".")[-1] == kind) if isinstance(kind, str) else isinstance(module, kind):
            part, index = name.split(".")[:2]
            if part == "mid_block":
                found.add(last)
            else:
                found.add(int(index) if part == "down_blocks" else last - int(index))
    return found


def modules_of(unet: SnapGenUNet, kind: type) -> list[nn.Module]:
    return [module for module in unet.modules() if isinstance(module, kind)]


@lru_cache
def ablation(letter: str) -> SnapGenUNet:
    with torch.device("meta"):
        return SnapGenUNet.from_preset(f"ablation-{letter}")


def test_b_leaves_self_attention_in_the_lowest_stage_only():
    # "self_attention" is None where it is missing, and then no module.
    assert stages_with(ablation("a"), "self_attention") == {1, 2}
    for letter in "bcdefg":
        assert stages_with(ablation(letter), "self_attention") == {2}


def test_c_makes_every_3x3_convolution_but_the_outer_two_depthwise():
    def dense(unet):
        convs = [(name, m) for name, m in unet.named_modules() if isinstance(m, nn.Conv2d)]
        return [name for name, m in convs if m.kernel_size == (3, 3) and m.groups == 1]

    assert len(dense(ablation("b"))) > 30
    for letter in ("c0", "c", "g"):
        assert dense(ablation(letter)) == ["conv_in", "conv_out"]


def test_c_expands_inside_residual_blocks():
    for letter, ratio in (("c0", 1), ("c", 2)):
        for block in modules_of(ablation(letter), ResidualBlock):
            width_in, width_out = block.norm1.num_channels, block.conv2[-1].out_channels
            assert block.norm2.num_channels == ratio * max(width_in, width_out)


def test_d_trims_and_e_shares_heads_in_self_and_cross_attention():
    for letter, ratio in (("c", 4), ("d", 3)):
        for ffn in modules_of(ablation(letter), FeedForward):
            assert ffn.project_out.in_features == ratio * ffn.project_out.out_features
    for letter, shared in (("d", False), ("e", True)):
        for attention in modules_of(ablation(letter), Attention):
            width = 64 if shared else attention.to_q.out_features
            assert attention.to_k.out_features == attention.to_v.out_features == width


def test_f_puts_cross_attention_in_place_of_residual_blocks_in_the_first_stage():
    e, f = ablation("e"), ablation("f")
    assert stages_with(e, ResidualBlock) == {0, 1, 2} and stages_with(e, "cross_attention") == {1, 2}
    assert stages_with(f, ResidualBlock) == {1, 2} and stages_with(f, "cross_attention") == {0, 1, 2}


def test_g_normalises_all_queries_and_keys_and_rotates_self_attention_only():
    f, g = ablation("f"), ablation("g")
    assert stages_with(f, nn.RMSNorm) == stages_with(f, Rope2d) == set()
    assert stages_with(g, nn.RMSNorm) == {0, 1, 2} and stages_with(g, Rope2d) == {2}
    assert UNET_PRESETS["ablation-g"] == UNET_PRESETS["paper-imagenet"]


def test_every_attention_reads_what_its_name_says():
    unet = small_unet()
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            assert module.to_k.in_features == (24 if name.endswith("cross_attention") else module.to_q.in_features)


def test_preset_and_constructor_have_the_same_names_and_defaults():
    signature = inspect.signature(SnapGenUNet.__init__).parameters
    for field in fields(UNetPreset):
        assert signature[field.name].default == field.default, field.name


# --- parts, each against its formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_convolution_is_a_dense_one_with_the_composed_kernel(stride):
    conv = conv3x3(6, 10, separable=True, stride=stride)
    depthwise, pointwise = conv
    kernel = torch.einsum("oi,ikl->oikl", pointwise.weight[:, :, 0, 0], depthwise.weight[:, 0])
    x = torch.randn(2, 6, 9, 8)
    expected = F.conv2d(x, kernel, pointwise.bias, stride, padding=1)
    assert torch.allclose(conv(x), expected, atol=1e-5)
    assert conv(x).shape == conv3x3(6, 10, separable=False, stride=stride)(x).shape


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("kv_heads", [1, 2, None])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_multi_head_attention_with_keys_and_values_repeated(kv_heads, cross, qk_norm):
    heads, width, dim = 4, 8, 32
    torch.manual_seed(0)
    source_dim = 20 if cross else dim
    attention = Attention(dim, source_dim, AttentionOptions(20, width, kv_heads, 3, qk_norm, None, 8)).double()
    x, context = torch.randn(2, 5, dim).double(), torch.randn(2, 7, 20).double()
    source = context if cross else x
    if qk_norm:
        nn.init.uniform_(attention.norm_q.weight, 0.5, 2)
        nn.init.uniform_(attention.norm_k.weight, 0.5, 2)
    each = heads // (kv_heads or heads)  # queries of one key/value head
    result = []
    for head in range(heads):
        rows, shared = slice(head * width, (head + 1) * width), slice(head // each * width, (head // each + 1) * width)
        q, k = x @ attention.to_q.weight[rows].T, source @ attention.to_k.weight[shared].T
        v = source @ attention.to_v.weight[shared].T
        if qk_norm:
            q, k = rms_norm(q, attention.norm_q.weight), rms_norm(k, attention.norm_k.weight)
        result.append(torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v)
    expected = attention.to_out(torch.cat(result, dim=-1))
    assert torch.allclose(attention(x, context if cross else None), expected, atol=1e-10)


def test_qk_norm_survives_squares_beyond_fp16():
    attention = Attention(32, 32, AttentionOptions(32, 8, 1, 3, True, None, 8))
    q = torch.randn(2, 5, 4, 8) * 3000  # squares reach 1e7, fp16 ends at 65504
    expected = rms_norm(q, torch.ones(8))
    for dtype in (torch.float16, torch.bfloat16):
        normed = attention.norm_q.to(dtype)(q.to(dtype))
        assert normed.dtype == dtype and torch.allclose(normed.float(), expected, atol=0.03)


def test_rope_scores_depend_on_relative_offsets_only():
    height, width = 5, 7
    torch.manual_seed(0)
    cos, sin = Rope2d(16, theta=100.0)(height, width)
    q, k = torch.randn(2, 16)
    everywhere = (1, height * width, 1, 16)
    scores = rotate(q.expand(everywhere), cos, sin)[0, :, 0] @ rotate(k.expand(everywhere), cos, sin)[0, :, 0].T
    by_offset = {}
    for i in range(height * width):
        for j in range(height * width):
            offset = (i // width - j // width, i % width - j % width)
            by_offset.setdefault(offset, []).append(scores[i, j].item())
    assert all(max(same) - min(same) < 1e-4 for same in by_offset.values())
    means = torch.tensor([same[0] for same in by_offset.values()])
    assert len(means) == (2 * height - 1) * (2 * width - 1)
    assert (means[:, None] - means).abs().fill_diagonal_(1).min() > 1e-6  # and no two offsets look the same
    assert by_offset[0, 0][0] == pytest.approx((q @ k).item(), abs=1e-4)


def test_rope_is_a_complex_rotation_by_row_and_column():
    height, width, dim = 3, 4, 16
    x = torch.randn(2, height * width, 3, dim)
    turned = rotate(x, *Rope2d(dim, theta=10_000.0)(height, width))
    row = torch.arange(height).repeat_interleave(width)[:, None]
    column = torch.arange(width).repeat(height)[:, None]
    frequency = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
    angle = torch.cat([row * frequency, column * frequency], dim=1)[:, None]
    expected = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(1j * angle)
    assert torch.allclose(turned, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-5)


def test_rope_beyond_its_table_continues_it():
    short, long = Rope2d(16, 100.0, positions=3), Rope2d(16, 100.0, positions=30)
    for a, b in zip(short(5, 9), long(5, 9)):
        assert torch.equal(a, b)


def test_feed_forward_is_geglu():
    ffn = FeedForward(8, 3)
    x = torch.randn(2, 5, 8)
    value, gate = (x @ ffn.project_in.weight.T + ffn.project_in.bias).split(24, dim=-1)
    expected = (value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5))) @ ffn.project_out.weight.T + ffn.project_out.bias
    assert torch.allclose(ffn(x), expected, atol=1e-5)


def test_timestep_embedding_is_the_usual_one_in_fp32():
    t = torch.tensor([0.0, 0.3, 500.5, 1000.0])
    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(t, 64), expected, atol=1e-4)
    # In bf16 777 and 778 are the same number: the angles must not be rounded with the weights.
    assert timestep_embedding(torch.tensor([777]), 64).dtype == torch.float32
    unet = small_unet().bfloat16()
    sample, _, context = (v.bfloat16() for v in inputs(1))
    assert not torch.equal(unet(sample, 777, context).sample, unet(sample, 778, context).sample)


# --- the whole network -----------------------------------------------------------------------------------------------


def test_untrained_network_predicts_zero_and_all_of_it_can_learn():
    sample, t, context = inputs()
    assert torch.equal(SnapGenUNet(**asdict(SMALL))(sample, t, context).sample, torch.zeros_like(sample))
    unet = small_unet()
    unet(sample, t, context).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_it_learns():
    torch.manual_seed(0)
    unet = SnapGenUNet(**asdict(SMALLEST))
    optimiser = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    sample, t, context = inputs(4)
    target = torch.randn(4, 4, 8, 8)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(unet(sample, t, context).sample, target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_text_time_and_neighbours_matter_but_not_the_rest_of_the_batch():
    unet = small_unet().eval()
    sample, t, context = inputs(2)
    out = unet(sample, t, context).sample
    assert not torch.allclose(unet(sample, t, context.flip(0)).sample, out, atol=1e-3)
    assert not torch.allclose(unet(sample, t.flip(0), context).sample, out, atol=1e-3)
    changed = sample.clone()
    changed[:, :, 0, 0] += 1
    assert ((unet(changed, t, context).sample - out).abs().amax(1) > 1e-6).all()  # every pixel hears of it
    assert torch.allclose(unet(sample[:1], t[:1], context[:1]).sample, out[:1], atol=1e-5)


def test_scalar_timestep_and_tuple_output():
    unet = small_unet().eval()
    sample, _, context = inputs(2)
    expected = unet(sample, torch.full((2,), 250.0), context).sample
    for t in (250, 250.0, torch.tensor(250), torch.tensor(250.0, dtype=torch.float64)):
        assert torch.allclose(unet(sample, t, context).sample, expected, atol=1e-6)
    (out,) = unet(sample, 250, context, return_dict=False)
    assert torch.equal(out, unet(sample, 250, context).sample)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (7, 12), (9, 13)])
def test_sizes_that_do_not_divide(size):
    sample, t, context = inputs(2, *size)
    out = small_unet()(sample, t, context).sample
    assert out.shape == sample.shape and out.isfinite().all()


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_16_bits_stay_close_to_fp32(dtype, error):
    unet = small_unet().eval()
    sample, t, context = inputs()
    expected = unet(sample, t, context).sample
    out = unet.to(dtype)(sample.to(dtype), t, context.to(dtype)).sample
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < error * expected.std()


@pytest.mark.parametrize("batch, size", [(1, 8), (3, 7)])
def test_slices_give_what_the_whole_gives(batch, size, monkeypatch):
    unet = small_unet().eval()
    args = inputs(batch, size, size)
    seen = []
    unet.up_blocks[-1].blocks[0].transformer.layers[0].ffn.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    results = []
    for tokens in (10**6, 24):
        monkeypatch.setattr(attention_module, "SLICE", tokens)
        with torch.no_grad():
            results.append(unet(*args).sample)
    assert len(seen) > 2 and sum(seen[1:]) == seen[0] == size**2 and max(seen[1:]) == 24 // batch
    assert torch.allclose(*results, atol=1e-5)
    seen.clear()
    unet(*args).sample.sum().backward()  # with gradients everything has to be kept, and slices would save nothing
    assert seen == [size**2]


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training):
    unet = small_unet(SMALLEST).train(training)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    results = []
    for module in (unet, compiled):
        for parameter in unet.parameters():
            parameter.grad = None
        with torch.set_grad_enabled(training):
            out = module(*inputs()).sample
        if training:
            out.square().sum().backward()
        results.append([out, *(p.grad for p in unet.parameters() if training)])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*results))


def test_gradient_checkpointing_gives_the_same_gradients():
    sample, t, context = inputs()
    gradients, kept, hooked = [], [], []
    for checkpointing in (False, True):
        unet = small_unet()
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.mid_block.register_forward_hook(lambda module, args, output: hooked.append(output))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss = unet(sample, t, context).sample.square().sum()
        loss.backward()
        gradients.append([p.grad for p in unet.parameters()])
        kept.append(sum(saved))
        assert unet.is_gradient_checkpointing == checkpointing
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*gradients))
    assert len(hooked) == 1 and hooked[0].shape == (2, 96, 2, 2)  # the feature, once, at the lowest resolution


def test_save_and_load_round_trip(tmp_path):
    unet = small_unet(kv_heads=2, separable_conv=False).eval()
    unet.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = SnapGenUNet.from_pretrained(tmp_path)
    assert again.state_dict().keys() == unet.state_dict().keys() and not any("rope" in key for key in unet.state_dict())
    sample, t, context = inputs()
    assert torch.equal(again(sample, t, context).sample, unet(sample, t, context).sample)
    half = SnapGenUNet.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_pickled_weights_are_refused(tmp_path):
    small_unet().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        SnapGenUNet.from_pretrained(tmp_path)


def test_exports_and_agrees():
    unet = small_unet(SMALLEST).eval()
    args = inputs(1)
    program = torch.export.export(unet, args).run_decompositions({})
    assert torch.allclose(program.module()(*args).sample, unet(*args).sample, atol=1e-5)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sample=torch.zeros(2, 3, 8, 8)), r"sample must be \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        (dict(sample=torch.zeros(4, 8, 8)), r"sample must be \[B, 4, H, W\]"),
        (dict(context=torch.zeros(2, 7, 23)), r"encoder_hidden_states must be \[2, L, 24\], got \[2, 7, 23\]"),
        (dict(context=torch.zeros(1, 7, 24)), r"encoder_hidden_states must be \[2, L, 24\]"),
        (dict(context=torch.zeros(7, 24)), r"encoder_hidden_states must be \[2, L, 24\]"),
        (dict(t=torch.zeros(3)), r"timestep must be a number or \[2\], got \[3\]"),
        (dict(t=torch.zeros(2, 1)), r"timestep must be a number or \[2\], got \[2, 1\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    given = dict(zip(("sample", "t", "context"), inputs())) | change
    with pytest.raises(ValueError, match=message):
        small_unet()(given["sample"], given["t"], given["context"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(channels=(32, 60, 96)), "multiples of head_dim=16 and norm_groups=32"),
        (dict(transformer_depth=(1, 1)), "transformer_depth needs a value for each of 3 stages"),
        (dict(kv_heads=3), "kv_heads=3 must divide"),
        (dict(transformer_depth=(0, 1, 1)), "at least 1"),
        (dict(head_dim=2, kv_heads=1), "multiple of 4"),
    ],
)
def test_switches_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SnapGenUNet(**asdict(replace(SMALL, **change)))


def test_unknown_preset_lists_the_choices():
    with pytest.raises(UserError) as error:
        SnapGenUNet.from_preset("huge")
    assert all(name in str(error.value) for name in ("huge", *UNET_PRESETS))
