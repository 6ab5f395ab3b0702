"""The parts of a bundle as an app meets them: names, shapes and order of Apple's ml-stable-diffusion, SD3 pipeline.

That app hands the prompt's embeddings over as one map: the two CLIPs side by side on channels, filled up with zeros, and the
third encoder's tokens behind theirs. That is the student's own context, so unpacking is a cut. It always calls the denoiser
with a batch of two, prompt and negative prompt, and mixes the two answers. A student that was distilled to do without
guidance is run once, and answers the same twice: whatever the mixing weight, the mix is that answer.

Every part is a module with fixed shapes whose arguments bear the contract's names. `inputs` has an example of each.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decoder import TinyDecoder
from ..errors import UserError
from ..pipeline import SnapGenPipeline
from ..text import unit_rms, until_end
from .phone import PhoneGroupNorm, PhoneUNet, replace_modules

APP_WIDTH = 4096  # channels of the app's embeddings for SD3: T5's, for whose sake the others are filled up


@dataclass(frozen=True)
class Part:
    """A module to convert.

    Args:
        name: of the package.
        module: what is converted; its forward's arguments and `outputs` bear the contract's names.
        inputs: an example of each argument, in order; all inputs are 32-bit floats, token numbers included.
        outputs: names of what it returns, in order.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    @torch.no_grad()
    def answers(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What torch computes, by the outputs' names."""
        found = self.module(**inputs)
        return dict(zip(self.outputs, found if isinstance(found, tuple) else (found,)))


class ClipPart(nn.Module):
    """forward(input_ids [1, T] as floats) -> (hidden_embeds [1, T, d], pooled_outputs [1, p]).

    The penultimate layer, zero behind the prompt's end, as the student knows it.
    """

    def __init__(self, clip: nn.Module, end_id: int):
        super().__init__()
        self.clip, self.end_id = clip, end_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = input_ids.int()
        answer = self.clip(input_ids=ids, output_hidden_states=True)
        return answer.hidden_states[-2] * until_end(ids, self.end_id)[..., None], answer.text_embeds


class LanguagePart(nn.Module):
    """forward(input_ids [1, S] as floats) -> encoder_hidden_states [1, S, D]: unit RMS for each token, zero for padding.

    The mask of the attention is made here, as a sum with -1e4 where a token must not look: transformers would make it of
    operations that Core ML lacks, and with infinities, of which the Neural Engine makes NaN.
    """

    def __init__(self, model: nn.Module, pad_id: int, tokens: int):
        super().__init__()
        self.model, self.pad_id = model, pad_id
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        ahead = torch.ones(tokens, tokens).triu(1) if causal else torch.zeros(tokens, tokens)
        self.register_buffer("ahead", ahead[None, None], persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.int()
        reads = (ids != self.pad_id).float()
        hidden = torch.maximum(self.ahead, 1 - reads[:, None, None])  # (1, 1, S, S)
        return unit_rms(self.model(input_ids=ids, attention_mask=-1e4 * hidden).last_hidden_state) * reads[..., None]


class DenoiserPart(nn.Module):
    """forward(latent_image_embeddings [2,C,h,w], timestep [2], token_level_text_embeddings [2,W,1,L], pooled_text_embeddings
    [2,P,1,1]) -> velocity [2,C,h,w]. The student has no use for the pooled embeddings."""

    def __init__(self, unet: PhoneUNet, context_dim: int, guided: bool):
        super().__init__()
        self.unet, self.context_dim, self.guided = unet, context_dim, guided

    def forward(self, latent_image_embeddings: Tensor, timestep: Tensor, token_level_text_embeddings: Tensor, pooled_text_embeddings: Tensor) -> Tensor:
        context = token_level_text_embeddings[:, : self.context_dim]
        if self.guided:
            return self.unet(latent_image_embeddings, timestep, context)
        velocity = self.unet(latent_image_embeddings[:1], timestep[:1], context[:1])
        return torch.cat([velocity, velocity])


class DecoderPart(nn.Module):
    """forward(z [1,C,h,w]) -> image [1,3,8h,8w] in [-1, 1]. The app hands over latents of the autoencoder's own range."""

    def __init__(self, decoder: TinyDecoder, scale: float, shift: float):
        super().__init__()
        self.decoder, self.scale, self.shift = decoder, scale, shift

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder((z - self.shift) * self.scale).sample.clamp(-1, 1)


def parts(pipe: SnapGenPipeline, guided: bool) -> list[Part]:
    """The parts of a pipeline with a tiny decoder, in the order in which a picture passes them.

    Args:
        guided: whether the denoiser answers prompt and negative prompt; False for a student that needs no guidance.

    Raises:
        UserError: the pipeline has no tiny decoder.
    """
    if pipe.decoder is None:
        raise UserError("the autoencoder's own decoder is too large for a phone: load the pipeline with the tiny decoder")
    text, config, vae = pipe.text, pipe.unet.config, pipe.vae.config
    side, (width_l, width_g, width) = pipe.config.image_size // 8, text.shape.widths
    pooled = text.clip_l.config.projection_dim + text.clip_g.config.projection_dim
    app_width = APP_WIDTH if (width_l, width_g) == (768, 1280) else width
    clip_ids, lm_ids = torch.ones(1, text.shape.clip_tokens), torch.ones(1, text.shape.lm_tokens)
    decoder = copy.deepcopy(pipe.decoder).float().eval()
    replace_modules(decoder, nn.GroupNorm, PhoneGroupNorm)
    made = [
        Part("TextEncoder", ClipPart(text.clip_l, text.tokenizers["clip_l"].eos_token_id), {"input_ids": clip_ids}, ("hidden_embeds", "pooled_outputs")),
        Part("TextEncoder2", ClipPart(text.clip_g, text.tokenizers["clip_g"].eos_token_id), {"input_ids": clip_ids}, ("hidden_embeds", "pooled_outputs")),
        Part("TextEncoder3", LanguagePart(text.lm, text.tokenizers["lm"].pad_token_id, text.shape.lm_tokens), {"input_ids": lm_ids}, ("encoder_hidden_states",)),
        Part(
            "MultiModalDiffusionTransformer",
            DenoiserPart(PhoneUNet(pipe.unet, side), config.context_dim, guided),
            {
                "latent_image_embeddings": torch.zeros(2, config.in_channels, side, side),
                "timestep": torch.full((2,), 1000.0),
                "token_level_text_embeddings": torch.zeros(2, app_width, 1, text.shape.clip_tokens + text.shape.lm_tokens),
                "pooled_text_embeddings": torch.zeros(2, pooled, 1, 1),
            },
            ("velocity",),
        ),
        Part("VAEDecoder", DecoderPart(decoder, vae.scaling_factor, vae.shift_factor), {"z": torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))}, ("image",)),
    ]
    for part in made:
        part.module.requires_grad_(False).eval()
    return made
