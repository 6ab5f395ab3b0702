"""The teachers of Sec. 3.3: SD3.5's transformers (MMDiT), and a tiny twin of the same class that is trained here.

A teacher shares the student's latents and its flow: it answers the same x_t at the same timestep. It reads the prompt with
text encoders of its own, and a prompt "" is its unconditional one.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from . import flow
from .errors import UserError, reason
from .files import atomic_write
from .latents import encode, load_autoencoder
from .paths import checkpoint_dir
from .scales import get_scale
from .text import EmbeddingStore, TextEncoders, fuse, load_encoder, load_text_encoders
from .weights import load_model, weights_digest


class TeacherText(Protocol):
    """What reads prompts for a teacher."""

    def to(self, device: torch.device | str) -> "TeacherText": ...

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """context [B, L, D] and pooled [B, P], the two forms in which SD3 takes text."""


class Teacher(nn.Module):
    """A frozen SD3 transformer that also shows its last block's features, "the richest information in transformers".

    forward(x_t [B,C,h,w], timestep [B] = 1000 sigma, context [B,L,D], pooled [B,P])
    -> (velocity [B,C,h,w], features [B,D,h/p,w/p]), p the size of a patch.
    """

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer
        self.requires_grad_(False).eval()
        transformer.transformer_blocks[-1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        self._tokens = outputs[1]  # outputs: the text's tokens (none after the last block), the picture's

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def feature_size(self, latent_size: int) -> tuple[int, int, int]:
        """(D, H, W) of the features of square latents."""
        side = latent_size // self.transformer.config.patch_size
        return self.transformer.inner_dim, side, side

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.transformer.dtype
        velocity = self.transformer(x.to(kind), context.to(kind), pooled.to(kind), timestep).sample
        tokens, size = self._tokens, self.feature_size(x.shape[-1])
        del self._tokens  # at paper scale 20 MB a picture
        return velocity, _as_map(tokens, size)

    def block_features(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Features [B,D,h/p,w/p] behind the blocks of these numbers: what the discriminator of Eq. 9 judges by. Gradients
        reach x; the weights stay as they are."""
        found: dict[int, Tensor] = {}

        def keep(number: int):
            return lambda block, inputs, outputs: found.update({number: outputs[1]})

        hooks = [self.transformer.transformer_blocks[number].register_forward_hook(keep(number)) for number in blocks]
        try:
            kind = self.transformer.dtype
            self.transformer(x.to(kind), context.to(kind), pooled.to(kind), timestep)
        finally:
            for hook in hooks:
                hook.remove()
        del self._tokens
        return [_as_map(found[number], self.feature_size(x.shape[-1])) for number in blocks]


def _as_map(tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Tokens [B,N,D] as a map [B,D,H,W] of `size` (D, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size[1:])


def build_twin(scale: str) -> SD3Transformer2DModel:
    """The twin with fresh weights. Raises UserError where the scale has none."""
    config = get_scale(scale).teacher
    if config is None:
        raise UserError(f"scale {scale} trains no teacher: it takes {get_scale(scale).teacher_hub}")
    model = SD3Transformer2DModel(**config)
    # diffusers leaves the layers as torch makes them, for it only loads. A new model starts as DiT does [Peebles & Xie 2023]:
    # every block is the identity, and the velocity is zero.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    norms = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*norms, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
    return model


class TwinText:
    """How the twin reads prompts: the student's encoders, fused, and the CLIPs' pooled embeddings; "" is zeros."""

    def __init__(self, encoders: TextEncoders):
        self.encoders = encoders

    def to(self, device: torch.device | str) -> "TwinText":
        self.encoders.to(device)
        return self

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        empty = torch.tensor([not prompt for prompt in prompts], device=self.encoders.device)
        context, pooled = self.encoders.encode(prompts), self.encoders.pooled(prompts)
        return context.masked_fill(empty[:, None, None], 0.0), pooled.masked_fill(empty[:, None], 0.0)


class StoredText:
    """The same for training captions, from where the student's text is stored."""

    def __init__(self, store: EmbeddingStore):
        self.store = store

    def to(self, device: torch.device | str) -> "StoredText":
        return self  # what is stored stays where there is room for it

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        context, pooled = fuse(*self.store.gather(prompts)), self.store.pooled(prompts)
        empty = torch.tensor([not prompt for prompt in prompts], device=context.device)
        return context.masked_fill(empty[:, None, None], 0.0), pooled.masked_fill(empty[:, None], 0.0)


class SD35Text:
    """How SD3.5 reads prompts: diffusers' pipeline with both CLIPs and T5, which is optional: without it zeros stand there."""

    def __init__(self, pipe: StableDiffusion3Pipeline):
        self.pipe = pipe

    def to(self, device: torch.device | str) -> "SD35Text":
        self.pipe.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        context, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
        return context, pooled


# ------------------------------------------------------------------------------------------------- loading


def load_teacher(scale: str, folder: Path | None = None, t5: bool = True, few_steps: bool = False) -> tuple[Teacher, TeacherText]:
    """The teacher of `scale`, or its few-step teacher, frozen, and what reads prompts for it; both on the CPU.

    At `tiny` the twin (fp32) that ships or that is in `folder`; else SD3.5 in bf16 from the hub, or from a pipeline's
    folder with `transformer`, `vae`, `text_encoder`, ...; its T5 is left out where the folder has none or `t5` is False.

    Raises:
        UserError: it is missing or damaged, or it is no teacher for the scale's student: other latents, another size.
    """
    config = get_scale(scale)
    if config.teacher:
        if not t5:
            raise UserError(f"the teacher of scale {scale} has no T5")
        stage = "turbo" if few_steps else "teacher"
        folder = Path(folder or checkpoint_dir(scale) / stage)
        transformer, reference = load_transformer(folder, stage), _load_reference(folder)
        text = TwinText(load_text_encoders(config))
    else:
        t5 = t5 and (folder is None or (Path(folder) / "text_encoder_3").is_dir())
        place = _pipeline_place(config.turbo_hub if few_steps else config.teacher_hub, folder, t5)
        transformer = load_model(SD3Transformer2DModel, place, f"the teacher in {place}", dtype=torch.bfloat16, subfolder="transformer")
        reference = reference_latents(load_model(AutoencoderKL, place, f"the autoencoder in {place}", subfolder="vae"))
        text = _load_sd35_text(place, transformer, t5)
    teacher = Teacher(transformer)
    check_teacher(teacher, text, reference, scale)
    return teacher, text


def load_transformer(folder: Path, stage: str = "teacher") -> SD3Transformer2DModel:
    """A twin that `snapgen train STAGE` made, fp32. Raises UserError where there is none, or no sound one."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no {stage} in {folder}: train one with `snapgen train {stage}` and --ship it")
    return load_model(SD3Transformer2DModel, folder, f"the teacher in {folder}")


def _pipeline_place(hub: str, folder: Path | None, t5: bool) -> str:
    if folder is None:
        return hub
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", *["tokenizer_3"] * t5):
        if not (Path(folder) / name).is_dir():
            raise UserError(f"no teacher in {folder}: it has no {name}; a teacher is a whole SD3.5 pipeline, as save_pretrained writes it")
    return str(folder)


def _load_sd35_text(place: str, transformer: SD3Transformer2DModel, t5: bool) -> SD35Text:
    parts = []
    for suffix, classes in (("", (CLIPTextModelWithProjection, CLIPTokenizer)), ("_2", (CLIPTextModelWithProjection, CLIPTokenizer)), ("_3", (T5EncoderModel, T5TokenizerFast))):
        wanted = t5 or suffix != "_3"
        parts += load_encoder(*classes, place, f"text_encoder{suffix}", f"tokenizer{suffix}", dtype=torch.bfloat16) if wanted else (None, None)
    names = [f"{part}{suffix}" for suffix in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")]
    # The pipeline asks the transformer how wide T5's zeros have to be.
    return SD35Text(StableDiffusion3Pipeline(transformer=transformer, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), **dict(zip(names, parts))))


# ------------------------------------------------------------------------------------------------- checks


def reference_latents(vae: AutoencoderKL) -> Tensor:
    """What `vae` makes of a picture of colour ramps, [1,16,8,8]: two networks share latents if they share these."""
    ramp = torch.linspace(-1, 1, 64)
    x, y = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    return encode(vae, torch.stack([x, y, x * y])[None]).cpu()


def save_reference(vae: AutoencoderKL, folder: Path) -> None:
    """Tell which latents the twin in `folder` has learned."""
    save_file({"reference": reference_latents(vae)}, folder / "latents.safetensors")


def _load_reference(folder: Path) -> Tensor:
    try:
        return load_file(folder / "latents.safetensors")["reference"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"cannot tell which latents the teacher in {folder} knows: {reason(error)} (latents.safetensors)") from None


def check_teacher(teacher: Teacher, text: TeacherText, reference: Tensor, scale: str) -> None:
    """UserError where `teacher` cannot teach the scale's student; `reference` are the reference latents that it knows."""
    config, held = get_scale(scale), teacher.transformer.config
    if (held.in_channels, held.out_channels) != (config.latent_channels, config.latent_channels):
        raise UserError(f"the teacher works on {held.in_channels} latent channels, the student of scale {scale} on {config.latent_channels}")
    ours = reference_latents(load_autoencoder(scale))
    if reference.shape != ours.shape or (reference - ours).norm() > 0.02 * ours.norm():  # 16 bits are 0.001 apart
        raise UserError(f"teacher and student have latents of different autoencoders: the teacher cannot judge what the student of scale {scale} draws")
    side, rest = divmod(config.latent_size, held.patch_size)
    if rest or side > held.pos_embed_max_size:
        raise UserError(f"the teacher's features do not fit: it cuts latents into patches of {held.patch_size}, at most {held.pos_embed_max_size} a side, and the student's have {config.latent_size}")
    context, pooled = text([""])
    if (context.shape[2], pooled.shape[1]) != (held.joint_attention_dim, held.pooled_projection_dim):
        raise UserError(f"the teacher reads text of widths {held.joint_attention_dim} and {held.pooled_projection_dim}, its encoders give {context.shape[2]} and {pooled.shape[1]}")


# ------------------------------------------------------------------------------------------------- drawing


def guided_velocity(teacher: Teacher, context: Tensor, pooled: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The field v(x [B,C,h,w], sigma) of prompts, guided; context [2B,L,D] and pooled [2B,P] begin with the unconditional
    prompt's. Guidance 1 asks for the prompts alone."""
    guided = guidance != 1
    if not guided:
        context, pooled = context.chunk(2)[1], pooled.chunk(2)[1]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        stacked = torch.cat([x, x]) if guided else x
        v = teacher(stacked, (flow.TIMESTEPS * sigma).to(x.device).expand(len(stacked)), context, pooled)[0].to(x.dtype)
        return flow.guide(*v.chunk(2), guidance) if guided else v

    return velocity


@torch.no_grad()
def sample(teacher: Teacher, text: TeacherText, prompts: Sequence[str], noise: Tensor, sigmas: Tensor, guidance: float) -> Tensor:
    """Latents of `prompts` drawn by the teacher itself, by Eq. 3 from `noise` [B,C,h,w], guided by the unconditional prompt."""
    return flow.sample(guided_velocity(teacher, *text([*[""] * len(prompts), *prompts]), guidance), noise, sigmas)


def drawn_latents(teacher: Teacher, text: TeacherText, prompts: Sequence[str], scale: str, steps: int, folder: Path, batch: int = 64) -> Tensor:
    """A latent of each prompt, drawn by a few-step teacher in `steps` without guidance: fp16 [len(prompts), C, h, w].

    Drawn once and kept in `folder`, under a name made of all that decides on them.
    """
    config, device = get_scale(scale), teacher.transformer.device
    digest = hashlib.sha256(f"{weights_digest(teacher)} {prompts} {steps}".encode())
    for tensor in text(prompts[:8]):
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    path = folder / f"drawn-{digest.hexdigest()[:16]}.safetensors"
    try:
        return load_file(path)["latents"]
    except (OSError, SafetensorError, KeyError):
        pass
    generator, drawn = torch.Generator().manual_seed(0), []
    for start in tqdm(range(0, len(prompts), batch), desc="the few-step teacher draws", unit="batch"):
        few = prompts[start : start + batch]
        noise = torch.randn(len(few), config.latent_channels, config.latent_size, config.latent_size, generator=generator)
        drawn.append(sample(teacher, text, few, noise.to(device), flow.inference_sigmas(steps, config.shift), 1.0).half().cpu())
    latents = torch.cat(drawn)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        save_file({"latents": latents}, part)
    return latents
