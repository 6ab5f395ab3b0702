"""Stage `kd`: the base student goes on with a teacher beside the data (Sec. 3.3, Eq. 4-8; Sec. 4, "Training Recipe", third step)."""

import hashlib
import math
import shutil
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import flow
from ..devices import best_device
from ..distill import Projector, constant_weights, feature_loss, multi_level, output_loss
from ..errors import UserError
from ..evaluate import evaluate_unet, load_detector
from ..files import atomic_write
from ..paths import cache_dir, checkpoint_dir
from ..pipeline import load_unet
from ..scales import get_scale
from ..teachers import StoredText, Teacher, TeacherText, TwinText, load_teacher
from ..train import TrainSettings, step_generator
from ..train.records import training_of
from ..unet import SnapGenUNet
from ..weights import load_model, save_half, weights_digest
from .base import TrainingSet, draw_prompts


class KdTraining(nn.Module):
    """forward(x0, eps [B,16,h,w], sigma [B], context [B,L,D], velocity [B,16,h,w], features [B,D,H,W]) -> (loss, figures).

    `velocity` and `features` are the teacher's. The student's features are those behind the last transformer of its lowest
    resolution, where most of its transformer layers are.

    Args:
        projector: psi of Eq. 5; None leaves feature distillation out.
        weights: None is Eq. 8, with timestep-aware scaling; (lambda_1, lambda_2) is Eq. 6.
    """

    def __init__(self, unet: SnapGenUNet, projector: Projector | None, shift: float, weights: tuple[float, float] | None = None):
        super().__init__()
        self.unet, self.projector = unet, projector
        self.shift, self.weights = shift, weights
        unet.up_blocks[0].blocks[-1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._features = output

    def losses(self, x0: Tensor, eps: Tensor, sigma: Tensor, context: Tensor, velocity: Tensor | None = None, features: Tensor | None = None) -> dict[str, Tensor]:
        """Eq. 2, 4 and 5 of each sample, [B]: those for which there are a teacher's answer and a projector."""
        v = self.unet(flow.interpolate(x0, eps, sigma), flow.TIMESTEPS * sigma, context).sample
        student_features = self.__dict__.pop("_features")
        losses = {"task": flow.flow_matching_loss(v, x0, eps)}
        if velocity is not None:
            losses["output"] = output_loss(velocity.float(), v.float())
        if self.projector is not None:
            losses["features"] = feature_loss(features.float(), self.projector(student_features).float())
        return losses

    def forward(self, sigma: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.losses(sigma=sigma, **batch)
        if self.weights is None:
            loss = multi_level(losses["task"], losses["output"], losses["features"], flow.unshift(sigma, self.shift))
        else:
            none = torch.zeros_like(losses["task"])
            loss = constant_weights(losses["task"], losses.get("output", none), losses.get("features", none), *self.weights)
        return loss, {name: value.detach().mean() for name, value in losses.items()}


class TaughtStage:
    """What the stages with a teacher beside the student share: its scenes, and how the teacher is placed and reads."""

    scale: str
    teacher: Teacher | None
    text: TeacherText
    mislabel = 0.0

    @cached_property
    def data(self) -> TrainingSet:
        data = TrainingSet(self.scale, 0)  # the scenes of `base`, whatever the seed of this stage
        data.scenes.captions = mislabelled(data.scenes.captions, self.mislabel)
        return data

    def prepare(self) -> None:
        load_detector()  # as in stage base
        self.data  # noqa: B018
        if self.teacher:  # only now: encoding captions needs the room, and the process its own GPU
            if isinstance(self.text, TwinText):
                self.text = StoredText(self.data.embeddings)  # it reads what the student reads
            self.teacher, self.text = self.teacher.to(best_device()), self.text.to(best_device())

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Latents [B,16,h,w], the student's context [B,L,D], and the prompts, which the teacher reads too.

        This step uses "all three text-encoders" (Sec. 4): no single one is dropped. With one missing, the teacher's answer to
        the whole prompt would be as much of a guess for the student as the data are.
        """
        latents, prompts = draw_prompts(self.data, count, generator)
        return latents, StoredText(self.data.embeddings)(prompts)[0], prompts


class KdStage(TaughtStage):
    """See `snapgen_core.train.Stage`.

    Args:
        teacher: folder of a teacher in place of the scale's own (`load_teacher`).
        constant: "L1,L2", the weights of Eq. 6 in place of Eq. 8; "0,0" goes on without a teacher.
        student: folder of the student to begin with, in place of the shipped base student.
        mislabel: share of the scenes that carry another scene's caption, as pictures from the web often do.
        stored: the teacher's answers to the first so many batches are kept on disk, and training goes round these.
        t5: "no" leaves out SD3.5's largest text encoder.
    """

    name = "kd"

    def __init__(self, scale: str, seed: int, teacher: Path | None = None, constant: str | None = None, student: Path | None = None, mislabel: float = 0.0, stored: int | None = None, t5: str | None = None):
        self.scale, self.seed, self.mislabel, self.stored = scale, seed, mislabel, stored
        weights = None if constant is None else parse_weights(constant)
        options = {"teacher": teacher, "constant": weights and f"{weights[0]:g},{weights[1]:g}", "student": student, "mislabel": f"{mislabel:g}" if mislabel else None, "stored": stored, "t5": t5 if t5 == "no" else None}
        self.options = {name: str(value) for name, value in options.items() if value is not None}
        self.teacher = None
        if weights != (0, 0):
            self.teacher, self.text = load_teacher(scale, teacher, t5 != "no")
        elif teacher or stored or t5:
            raise UserError("with --constant 0,0 there is no teacher: leave out --teacher, --stored and --t5")
        torch.manual_seed(seed)
        unet = load_unet(student or checkpoint_dir(scale) / "base")
        projector = None
        if weights is None or weights[1] > 0:
            width, *size = self.teacher.feature_size(get_scale(scale).latent_size)
            projector = Projector(unet.config.channels[-1], width, tuple(size))
        self.module = KdTraining(unet, projector, get_scale(scale).shift, weights).to(memory_format=torch.channels_last)
        # Gradients are not clipped: Eq. 6 and 8 sum to losses of different size, and a bound would hold back some and not others.
        self.settings = TrainSettings(batch_size=64, learning_rate=4e-4, clip_norm=None, cooldown=0.5, steps=5_000)

    def prepare(self) -> None:
        if self.stored:
            folder = cache_dir(self.scale)
            folder.mkdir(parents=True, exist_ok=True)
            config = get_scale(self.scale)
            numbers = math.prod(self.teacher.feature_size(config.latent_size)) + config.latent_channels * config.latent_size**2
            size, free = 2 * numbers * self.settings.batch_size * self.stored / 2**30, shutil.disk_usage(folder).free / 2**30
            if size > free:
                raise UserError(f"the teacher's answers to {self.stored} batches take up to {size:,.1f} GiB, and {folder} has {free:,.1f} GiB left: store fewer")
        super().prepare()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        index = step % self.stored if self.stored else step
        batch, prompts = self.drawn(index, self.settings.batch_size // world, rank)
        if self.teacher is None:
            return batch
        if self.stored:
            answers = self.stored_answers(self.folder / f"{world}-{rank}-{index:08d}.safetensors", batch, prompts)
        else:
            answers = self.answers(batch, prompts)
        if self.module.projector is None:
            del answers["features"]
        return batch | answers

    def drawn(self, index: int, count: int, rank: int = 0) -> tuple[dict[str, Tensor], list[str]]:
        """Batch number `index` without the teacher's part, and its prompts."""
        generator = step_generator(self.seed, index, rank, best_device())
        x0, context, prompts = self.draw(count, generator)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        sigma = flow.sample_sigmas(count, generator, get_scale(self.scale).shift)
        return {"x0": x0, "eps": eps, "sigma": sigma, "context": context}, prompts

    def answers(self, batch: dict[str, Tensor], prompts: list[str]) -> dict[str, Tensor]:
        """The teacher's velocity and features."""
        context, pooled = self.text(prompts)
        device = self.teacher.transformer.device
        x = flow.interpolate(batch["x0"], batch["eps"], batch["sigma"]).to(device)
        velocity, features = self.teacher(x, flow.TIMESTEPS * batch["sigma"].to(device), context.to(device), pooled.to(device))
        return {"velocity": velocity, "features": features}

    def stored_answers(self, path: Path, batch: dict[str, Tensor], prompts: list[str]) -> dict[str, Tensor]:
        """`answers` from `path` in 16 bits; what is not there yet or is damaged is computed and written. Features always are
        among them, so that runs with other weights find the same answers."""
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass
        answers = {name: (value.half() if value.dtype == torch.float32 else value).cpu().contiguous() for name, value in self.answers(batch, prompts).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            save_file(answers, part)
        return answers

    @cached_property
    def folder(self) -> Path:
        """Where answers are stored: named by the teacher's weights, by the first batch and by how the teacher reads it: by all
        that decides on the files' content. The first batch alone need not show which captions are wrong."""
        batch, prompts = self.drawn(0, self.settings.batch_size)
        total = hashlib.sha256(f"{weights_digest(self.teacher)} {self.mislabel} {prompts}".encode())
        for tensor in (*batch.values(), *self.text(prompts)):
            total.update(tensor.float().cpu().contiguous().numpy().data)
        return cache_dir(self.scale) / f"teacher-{total.hexdigest()[:16]}"

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """SceneEval at 28 guided steps, overall and by task."""
        self.teacher = self.text = None  # their room is needed
        torch.cuda.empty_cache()
        return evaluate_unet(self.scale, self.module.unet, images=50)

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.unet, root / "kd")
        if self.module.projector is None:
            return [root / "kd"]
        save_half(self.module.projector, root / "kd_projector")
        return [root / "kd", root / "kd_projector"]

    def load(self, root: Path) -> None:
        self.module.unet.load_state_dict(load_unet(root / "kd").state_dict())
        if self.module.projector is not None:
            projector = load_model(Projector, root / "kd_projector", "the projector of stage kd")
            if projector.shape != self.module.projector.shape:
                raise UserError("the shipped projector belongs to another teacher's features: train without --warm-start")
            if training_of(root / "kd_projector") != training_of(root / "kd"):
                raise UserError("the shipped projector comes from another training than the student: train without --warm-start")
            self.module.projector.load_state_dict(projector.state_dict())


def mislabelled(captions: list[str], share: float) -> list[str]:
    """`captions` with a random `share` of them handed on among themselves, the same ones each time."""
    chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[: round(share * len(captions))].tolist()
    mixed = list(captions)
    for taker, giver in zip(chosen, chosen[1:] + chosen[:1]):
        mixed[taker] = captions[giver]
    return mixed


def parse_weights(text: str) -> tuple[float, float]:
    """"0.5,2" as (0.5, 2.0). Raises UserError."""
    try:
        output, features = (float(part) for part in text.split(","))
    except ValueError:
        output = features = math.nan
    if not (0 <= output < math.inf and 0 <= features < math.inf):
        raise UserError(f"{text!r} are no weights of Eq. 6: give two numbers from 0 up with a comma between them, such as 1,0.1")
    return output, features
