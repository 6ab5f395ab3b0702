"""The denoisers and decoders that a user would pick instead, as diffusers builds them from their published configurations.

Random weights: what is compared is the work of one forward pass at a 1024-pixel picture, for which every model gets the
latent and the text tokens that it was made for.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from .decoder import TinyDecoder
from .scales import UNET_PRESETS
from .unet import SnapGenUNet


@dataclass(frozen=True)
class Contender:
    """One line of a benchmark. `inputs` gives the arguments of a forward pass at batch 1, on the default device; `beside`
    names the line that it is compared with."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    beside: str | None = None
    compiled: bool = False
    activations_gib: float = 3.0  # at most, beside the weights


def _latent(channels: int, size: int = 128) -> Tensor:
    return torch.randn(1, channels, size, size)


def _context(tokens: int, width: int) -> Tensor:
    return torch.randn(1, tokens, width)


def _time() -> Tensor:
    return torch.tensor([500.0])


def _ours() -> dict:
    return {"sample": _latent(16), "timestep": _time(), "encoder_hidden_states": _context(154, 2304)}


def _baseline() -> nn.Module:
    return SnapGenUNet(**asdict(replace(UNET_PRESETS["ablation-a"], in_channels=16, out_channels=16, context_dim=2304)))


def _dreamlite() -> nn.Module:
    from diffusers import DreamLiteUNetModel

    return DreamLiteUNetModel(
        in_channels=16,
        out_channels=16,
        block_out_channels=(256, 512, 896),
        attention_head_dim=(4, 8, 14),
        transformer_layers_per_block=(1, 2, 4),
        cross_attention_dim=2304,
        use_linear_projection=True,
        ff_mult=3,
    )


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sdxl_inputs() -> dict:
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
    return {"sample": _latent(4), "timestep": _time(), "encoder_hidden_states": _context(77, 2048), "added_cond_kwargs": added}


def _sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def _sd15_inputs() -> dict:
    return {"sample": _latent(4), "timestep": _time(), "encoder_hidden_states": _context(77, 768)}


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)


def _sd3_inputs() -> dict:
    return {"hidden_states": _latent(16), "timestep": _time(), "encoder_hidden_states": _context(154, 4096), "pooled_projections": torch.randn(1, 2048)}


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=True)


def _pixart_inputs() -> dict:
    added = {"resolution": torch.tensor([[1024.0, 1024.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    return {"hidden_states": _latent(4), "timestep": _time(), "encoder_hidden_states": _context(120, 4096), "added_cond_kwargs": added}


def _sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel()


def _sana_inputs() -> dict:
    return {"hidden_states": _latent(32, size=32), "timestep": _time(), "encoder_hidden_states": _context(300, 2304)}


UNETS = {
    "ours": Contender("SnapGen UNet (paper)", lambda: SnapGenUNet.from_preset("paper"), _ours),
    "compiled": Contender("... with torch.compile", lambda: SnapGenUNet.from_preset("paper"), _ours, "ours", compiled=True),
    "baseline": Contender("our baseline (a)", _baseline, _ours, "ours"),
    "dreamlite": Contender("DreamLite UNet", _dreamlite, _ours, "ours"),
    "sana": Contender("Sana 1.6B (32x32 latent)", _sana, _sana_inputs, "ours"),
    "pixart": Contender("PixArt-alpha", _pixart, _pixart_inputs, "ours"),
    "sd15": Contender("SD 1.5 UNet", _sd15, _sd15_inputs, "ours"),
    "sd3": Contender("SD3-medium transformer", _sd3, _sd3_inputs, "ours"),
    "sdxl": Contender("SDXL UNet", _sdxl, _sdxl_inputs, "ours"),
}


def _step_inputs() -> dict:
    return {"sample": _latent(8), "timestep": _time(), "encoder_hidden_states": _context(77, 768)}


def _step(letter: str, before: str | None = None) -> Contender:
    return Contender(f"({letter})", lambda: SnapGenUNet.from_preset(f"ablation-{letter}"), _step_inputs, before)


# Fig. 2 and 3, on ImageNet, each step beside the one before; c0 and c both follow b.
BEFORE = {"a": None, "b": "a", "c0": "b", "c": "b", "d": "c", "e": "d", "f": "e", "g": "f"}
CHAIN = {letter: _step(letter, before) for letter, before in BEFORE.items()}


def _kl_decoder(latent_channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
    ).decoder


def _taesd3() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(latent_channels=16).decoder


DECODERS = {
    "ours": Contender("SnapGen decoder (paper)", lambda: TinyDecoder.from_preset("paper"), lambda: {"latent": _latent(16)}),
    "large": Contender("... for 2048 pixels", lambda: TinyDecoder.from_preset("paper"), lambda: {"latent": _latent(16, 256)}, "ours"),
    "taesd3": Contender("TAESD3 decoder", _taesd3, lambda: {"x": _latent(16)}, "ours"),
    "sdxl": Contender("SDXL decoder", lambda: _kl_decoder(4), lambda: {"sample": _latent(4)}, "ours", activations_gib=8.0),
    "sd3": Contender("SD3 decoder", lambda: _kl_decoder(16), lambda: {"sample": _latent(16)}, "ours", activations_gib=8.0),
}
BENCHMARKS = {"unet": UNETS, "chain": CHAIN, "decoder": DECODERS}
