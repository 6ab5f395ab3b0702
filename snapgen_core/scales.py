"""Presets: frozen dataclasses, one per model and scale; and what a pipeline may be made of."""

from dataclasses import dataclass, replace

from .errors import UserError


@dataclass(frozen=True)
class Scale:
    """One row of the table of scales: sizes that the models of a scale share.

    Image and latent sizes in pixels; token counts and widths are those of the fused text context (Sec. 4).
    `autoencoder` holds `AutoencoderKL` arguments where the autoencoder is trained here, `hub` the repository where
    pretrained parts come from. So for the teacher: `teacher` holds `SD3Transformer2DModel` arguments, or `teacher_hub` the
    repository, and `turbo_hub` that of the few-step teacher.
    """

    name: str
    image_size: int
    clip_tokens: int
    lm_tokens: int
    context_dim: int
    latent_channels: int = 16
    shift: float = 3.0  # Sec. 4, "time shift of 3 for both training and inference"
    autoencoder: dict | None = None
    hub: str | None = None
    teacher: dict | None = None
    teacher_hub: str | None = None
    turbo_hub: str | None = None

    @property
    def latent_size(self) -> int:
        return self.image_size // 8


# SD3's AutoencoderKL config with narrow widths, one layer a block and 8 norm groups.
_TINY_AUTOENCODER = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(24, 48, 96, 160),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    sample_size=64,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.0,  # shift and scale are measured when the autoencoder is shipped
    shift_factor=0.0,
)

# SD3.5's transformer with every token an eighth of the picture wide, as the student's: 7.8 M parameters, 16 MB in 16 bits.
_TINY_TEACHER = dict(
    sample_size=8,
    patch_size=1,
    in_channels=16,
    out_channels=16,
    num_layers=6,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=384,
    caption_projection_dim=192,
    pooled_projection_dim=256,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)

_SD35 = "stabilityai/stable-diffusion-3.5-medium"
_SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
_SD35_TURBO = "stabilityai/stable-diffusion-3.5-large-turbo"

SCALES = {
    "tiny": Scale("tiny", image_size=64, clip_tokens=24, lm_tokens=24, context_dim=384, autoencoder=_TINY_AUTOENCODER, teacher=_TINY_TEACHER),
    "small": Scale("small", image_size=256, clip_tokens=77, lm_tokens=77, context_dim=2304, hub=_SD35, teacher_hub=_SD35, turbo_hub=_SD35_TURBO),
    "paper": Scale("paper", image_size=1024, clip_tokens=77, lm_tokens=77, context_dim=2304, hub=_SD35, teacher_hub=_SD35_LARGE, turbo_hub=_SD35_TURBO),
}
SCALE_NAMES = tuple(SCALES)
PICTURE_STAGES = ("base", "kd", "distilled")  # students that draw
SAMPLING = {  # steps and guidance that a model draws with, unless told otherwise; 1 is no guidance
    "base": (28, 4.0),
    "kd": (28, 4.0),
    "distilled": (4, 1.0),
    "teacher": (28, 4.0),
    "turbo": (4, 1.0),
}
PICTURE_DECODERS = ("full", "tiny")  # the autoencoder's own, or that of Sec. 3.2
ENCODERS = ("clip_l", "clip_g", "lm")  # text encoders (Sec. 4), in the order of their parts of the context


def get_scale(name: str) -> Scale:
    if name not in SCALES:
        raise UserError(f"unknown scale {name!r}: choose one of {', '.join(SCALE_NAMES)}")
    return SCALES[name]


@dataclass(frozen=True)
class UNetPreset:
    """Arguments of `SnapGenUNet`, explained there. The defaults are the paper's text-to-image model (379 M)."""

    in_channels: int = 16
    out_channels: int = 16
    context_dim: int = 2304
    channels: tuple[int, ...] = (256, 512, 896)
    transformer_depth: tuple[int, ...] = (1, 2, 4)
    layers_per_block: int = 2
    head_dim: int = 64
    time_embed_dim: int = 1024
    self_attention: tuple[bool, ...] = (False, False, True)
    separable_conv: bool = True
    expansion: float = 2
    ffn_ratio: float = 3
    kv_heads: int | None = 1
    residual_blocks: tuple[bool, ...] = (False, True, True)
    qk_norm: bool = True
    rope: bool = True


# The ablation of Fig. 2 and 3 on ImageNet (Supplement H: an 8-channel latent, texts from CLIP-L), each step on top of
# the one before. c0 is the step that the paper reports and rejects: separable convolutions that are not expanded.
_A = UNetPreset(
    in_channels=8,
    out_channels=8,
    context_dim=768,
    transformer_depth=(0, 2, 4),
    self_attention=(True, True, True),
    separable_conv=False,
    ffn_ratio=4,
    kv_heads=None,
    residual_blocks=(True, True, True),
    qk_norm=False,
    rope=False,
)
_B = replace(_A, self_attention=(False, False, True))
_C0 = replace(_B, separable_conv=True, expansion=1)
_C = replace(_B, separable_conv=True, expansion=2)
_D = replace(_C, ffn_ratio=3)
_E = replace(_D, kv_heads=1)
_F = replace(_E, transformer_depth=(1, 2, 4), residual_blocks=(False, True, True))
_G = replace(_F, qk_norm=True, rope=True)


def _tiny_twin(step: UNetPreset) -> UNetPreset:
    """The same step of the ablation at tiny: three stages as in the paper (8x8, 4x4, 2x2), a ninth to a quarter as
    wide and half as deep. The heads narrow with the widths, so that a shared one has something to replace."""
    return replace(
        step,
        in_channels=16,
        out_channels=16,
        context_dim=384,
        channels=(64, 64, 96),
        transformer_depth=tuple((depth + 1) // 2 for depth in step.transformer_depth),
        layers_per_block=1,
        head_dim=16,
        time_embed_dim=256,
    )


ABLATION = ("a", "b", "c", "d", "e", "f", "g")  # the rows of Fig. 3 that are kept

UNET_PRESETS = {
    # Two stages, 8x8 and 4x4: a third would be 2x2, too coarse to place anything. The first one keeps its residual
    # blocks beside the cross-attention: a token is an eighth of the picture wide, so no other stage sees edges. In 16
    # bits the weights stay under 16 MB.
    "tiny": UNetPreset(
        context_dim=384,
        channels=(96, 192),
        transformer_depth=(1, 1),
        head_dim=32,
        time_embed_dim=256,
        self_attention=(False, True),
        residual_blocks=(True, True),
    ),
    "small": UNetPreset(channels=(192, 320, 448), time_embed_dim=768),  # 115 M
    "paper": UNetPreset(),
    "paper-imagenet": _G,
    "ablation-a": _A,
    "ablation-b": _B,
    "ablation-c0": _C0,
    "ablation-c": _C,
    "ablation-d": _D,
    "ablation-e": _E,
    "ablation-f": _F,
    "ablation-g": _G,
    **{f"tiny-ablation-{letter}": _tiny_twin(step) for letter, step in zip(ABLATION, (_A, _B, _C, _D, _E, _F, _G))},
}


@dataclass(frozen=True)
class DecoderPreset:
    """Arguments of `TinyDecoder`, explained there. The defaults are the paper's (1.38 M)."""

    latent_channels: int = 16
    channels: tuple[int, ...] = (256, 224, 96, 96)
    blocks: tuple[int, ...] = (2, 2, 2, 1)
    middle: bool = False
    attention: bool = False
    norm: str = "minimal"
    separable_conv: bool = True
    conv_shortcut: bool = False
    norm_groups: int = 32


# From SD3's decoder to the paper's by the five changes of Sec. 3.2, each on top of those before.
_SD3 = DecoderPreset(
    channels=(512, 512, 256, 128),
    blocks=(3, 3, 3, 3),
    middle=True,
    attention=True,
    norm="all",
    separable_conv=False,
    conv_shortcut=True,
)
_D1 = replace(_SD3, attention=False)
_D2 = replace(_D1, norm="minimal")
_D3 = replace(_D2, channels=(256, 224, 96, 96), separable_conv=True)
_D4 = replace(_D3, blocks=(2, 2, 2, 1), middle=False)
_D5 = replace(_D4, conv_shortcut=False)

DECODER_PRESETS = {
    "tiny": DecoderPreset(channels=(88, 56, 32, 24), norm_groups=8),
    "small": _D5,  # the scale has SD3's latent, too
    "paper": _D5,
    "sd3": _SD3,
    "change-1": _D1,
    "change-2": _D2,
    "change-3": _D3,
    "change-4": _D4,
    "change-5": _D5,
}
