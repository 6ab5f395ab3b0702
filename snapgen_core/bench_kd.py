"""What a teacher costs: steps of stage `kd` timed, and at the paper's size counted, without weights; on a GPU with room for
it, timed there, too."""

import statistics
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import flow
from .bench import timed
from .devices import best_device
from .distill import Projector
from .profile import count_macs, count_parameters
from .scales import get_scale
from .stages.kd import KdStage, KdTraining
from .teachers import Teacher
from .unet import SnapGenUNet

MODES = {  # what is timed: options of stage `kd`
    "plain": {"constant": "0,0"},
    "stored": {"stored": 1},
    "live": {},
}
# SD3.5-Large's configuration, for counting: 8.06 B parameters.
SD35_LARGE = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64, num_attention_heads=38,
    joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm",
)
# What reads the prompts at the paper's size, parameters from the model cards; T5 is the teacher's alone.
TEXT_ENCODERS = {"T5": 4.76e9, "Gemma-2-2b": 2.61e9, "CLIP-L and CLIP-G": 0.82e9}


class Step:
    """A training step of stage `kd`, its batch and its optimiser included."""

    def __init__(self, scale: str, options: dict, teacher=None):
        self.device = best_device()
        self.stage = KdStage(scale, 0, **options, **({} if options.get("constant") == "0,0" else {"teacher": teacher}))
        self.module = self.stage.module.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, fused=True)

    def __call__(self) -> None:
        take_step(self.module, self.optimizer, {name: value.to(self.device) for name, value in self.stage.batch(0).items()})


def take_step(module: KdTraining, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """As the loop of `train` does."""
    kind = batch["x0"].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss, _ = module(**batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_steps(scale: str, runs: int, teacher=None) -> dict:
    """Seconds of a step without a teacher, with its answers from the disk, and with the teacher asked; and their ratios to
    the first. The three take turns, so that a machine whose speed changes does it to all of them."""
    steps = {mode: Step(scale, options, teacher) for mode, options in MODES.items()}
    data = steps["plain"].stage.data
    steps["stored"].stage.teacher, steps["stored"].stage.text = steps["live"].stage.teacher, steps["live"].stage.text  # one is enough
    for step in steps.values():
        step.stage.data = data
        step.stage.prepare()
    for step in steps.values():
        step()  # the first one takes memory, and keeps the stored answers
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in tqdm(range(runs), desc="steps", unit="round", leave=False):
        for mode, step in steps.items():
            seconds[mode] += timed(step, 1, step.device)
    result = {"batch_size": steps["plain"].stage.settings.batch_size}
    for mode, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["plain"]))
        result[mode] = {"seconds": own, "median": statistics.median(own), "ratio": ratio}
    return result


class FusedAttention(torch.autograd.Function):
    """Attention that keeps what a GPU's fused kernel keeps: queries, keys, values and the output, no matrix of scores."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, output)
        return output


def saved_bytes(module: nn.Module, **inputs: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out, attention fused. Works on meta tensors."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        held.append(storage)  # alive until the end, or its number would be used again
        return tensor

    held: list = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        return FusedAttention.apply(query, key, value)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), patch.object(F, "scaled_dot_product_attention", attention):
        module(**inputs)
    return sum(kept.values())


def paper_costs(text_tokens: int = 154, teacher_tokens: int = 333) -> dict[str, float]:
    """MACs and bytes of one sample at 1024 pixels: student, projector and SD3.5-Large, counted on meta tensors in bf16. Text
    encoders are left out: the student's text is read once and kept, and T5 adds less than a tenth to the teacher's MACs."""
    with torch.device("meta"):
        unet = SnapGenUNet.from_preset("paper").to(torch.bfloat16)
        teacher = SD3Transformer2DModel(**SD35_LARGE).to(torch.bfloat16)
        projector = Projector(unet.config.channels[-1], teacher.inner_dim, (64, 64)).to(torch.bfloat16)
        half = {"dtype": torch.bfloat16}
        latent, time = torch.empty(1, 16, 128, 128, **half), torch.empty(1)
        context, features = torch.empty(1, text_tokens, unet.config.context_dim, **half), torch.empty(1, unet.config.channels[-1], 32, 32, **half)
        costs = {
            "student_parameters": count_parameters(unet),
            "projector_parameters": count_parameters(projector),
            "teacher_parameters": count_parameters(teacher),
            "student_macs": count_macs(unet, latent, time, context),
            "projector_macs": count_macs(projector, features),
            "teacher_macs": count_macs(teacher, latent, torch.empty(1, teacher_tokens, 4096, **half), torch.empty(1, 2048, **half), time),
            "task_activation_bytes": saved_bytes(unet, sample=latent, timestep=time, encoder_hidden_states=context),
            "answer_bytes": 2 * (latent.numel() + teacher.inner_dim * 64 * 64),
        }
        training = KdTraining(unet, projector, 3.0)
        answers = {"velocity": latent, "features": torch.empty(1, teacher.inner_dim, 64, 64, **half)}
        costs["kd_activation_bytes"] = saved_bytes(training, x0=latent, eps=latent, sigma=time.to(torch.bfloat16), context=context, **answers)
    # A step computes forward once and backward twice what is trained, and forward once what is frozen.
    trained = 3 * (costs["student_macs"] + costs["projector_macs"])
    return costs | {"step_macs_ratio": (trained + costs["teacher_macs"]) / (3 * costs["student_macs"])}


def state_bytes(costs: dict[str, float], taught: bool) -> float:
    """Bytes that `paper_costs` asks for whatever the batch: fp32 weights, gradients and two moments of what is trained, and the
    teacher in 16 bits."""
    if not taught:
        return 16 * costs["student_parameters"]
    return 16 * (costs["student_parameters"] + costs["projector_parameters"]) + 2 * costs["teacher_parameters"]


def paper_steps(runs: int, batch_size: int = 4, scale: str = "paper", teacher_config: dict = SD35_LARGE, text_tokens: int = 154, teacher_tokens: int = 333) -> dict:
    """Seconds and peak bytes of a training step with fresh weights and random input, without a teacher and with it asked.

    A picture's own bytes are the slope between a batch of one and one of `batch_size`: {"batch_size", "plain" and "live":
    {"seconds", "median", "ratio", "peak_bytes", "sample_bytes"}}. Bytes are None on a CPU. Raises torch.OutOfMemoryError.
    """
    device, config = best_device(), get_scale(scale)
    with torch.device(device):
        unet = SnapGenUNet.from_preset(scale).train()
    found: dict = {"batch_size": batch_size}
    for mode in ("plain", "live"):
        teacher = projector = None
        if mode == "live":
            teacher = _fresh_teacher(teacher_config, device)
            width, *size = teacher.feature_size(config.latent_size)
            projector = Projector(unet.config.channels[-1], width, tuple(size)).to(device)
        training = KdTraining(unet, projector, config.shift, None if teacher else (0.0, 0.0)).to(memory_format=torch.channels_last)  # as KdStage
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-6, fused=True)

        def step(count: int) -> None:
            latents = (count, config.latent_channels, config.latent_size, config.latent_size)
            x0, eps, sigma = torch.randn(latents, device=device), torch.randn(latents, device=device), torch.rand(count, device=device)
            batch = {"x0": x0, "eps": eps, "sigma": sigma, "context": torch.randn(count, text_tokens, unet.config.context_dim, device=device)}
            if teacher:
                context, pooled = torch.randn(count, teacher_tokens, teacher_config["joint_attention_dim"], device=device), torch.randn(count, teacher_config["pooled_projection_dim"], device=device)
                batch["velocity"], batch["features"] = teacher(x0, flow.TIMESTEPS * sigma, context, pooled)
            take_step(training, optimizer, batch)

        step(1)  # the first one makes the moments
        least, peak = _peak_bytes(step, 1, device), _peak_bytes(step, batch_size, device)
        seconds = timed(lambda: step(batch_size), runs, device)
        sample_bytes = None if peak is None else (peak - least) / (batch_size - 1)
        found[mode] = {"seconds": seconds, "median": statistics.median(seconds), "peak_bytes": peak, "sample_bytes": sample_bytes}
    for mode in ("plain", "live"):
        found[mode]["ratio"] = found[mode]["median"] / found["plain"]["median"]
    return found


def _fresh_teacher(config: dict, device: torch.device) -> Teacher:
    """In bf16 from the beginning: at the paper's size it would take 32 GB in 32 bits."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Teacher(SD3Transformer2DModel(**config))
    finally:
        torch.set_default_dtype(usual)


def _peak_bytes(step, count: int, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step(count)
    return torch.cuda.max_memory_allocated(device)
