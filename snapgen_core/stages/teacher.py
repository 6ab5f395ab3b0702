"""Stage `teacher`: the tiny twin of SD3.5's transformer learns the flow from the scenes that the student saw.

Two cores are slow, so it does not begin with nothing. First it imitates the base student: that one's answer to a noisy
latent is the same every time, where the data's depends on which picture and noise were mixed there, and so a regression on
it needs fewer samples. Then, where the scene has to be made out of noise, it learns from the data, and goes beyond the
student; where the scene stands and only detail is missing, the student's answers go on to serve.
"""

from functools import cached_property
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import flow
from ..distill import output_loss
from ..evaluate import load_detector, scene_eval, teacher_generator
from ..latents import load_autoencoder
from ..paths import checkpoint_dir
from ..pipeline import load_unet
from ..scales import get_scale
from ..teachers import Teacher, TwinText, build_twin, load_transformer, save_reference
from ..text import fuse, load_text_encoders
from ..train import TrainSettings, step_generator
from ..unet import SnapGenUNet
from ..weights import save_half
from .base import TrainingSet

# The text is dropped whole, for guidance, and never one encoder alone: the student has to work with any subset of them on a
# phone (Sec. 4), its teacher always has all three. Nine of ten samples so show it the whole prompt, of the student's one in six.
DROP_PROBABILITY = 0.1
IMITATION = 8_000  # steps, those before a warm start included
DETAIL = 2 / 3  # noise levels below this are the student's for good: what is where has been decided above it


class TeacherTraining(nn.Module):
    """forward(x0, eps, target [B,16,h,w], sigma [B], context [B,L,D], pooled [B,P]) -> (mean squared error, figures).

    Against the data's velocity, `target` = eps - x0, that is Eq. 2.
    """

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, x0: Tensor, eps: Tensor, target: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        v = self.transformer(flow.interpolate(x0, eps, sigma), context, pooled, flow.TIMESTEPS * sigma).sample
        return output_loss(target, v).mean(), {"task": flow.flow_matching_loss(v.detach(), x0, eps).mean()}


class TeacherData(TrainingSet):
    """The student's training set, with pooled embeddings of the captions."""

    def __init__(self, scale: str, seed: int, batch: int = 256):
        super().__init__(scale, seed)
        encoders = load_text_encoders(get_scale(scale)).to("cuda" if torch.cuda.is_available() else "cpu")
        captions = sorted(dict.fromkeys(self.scenes.captions), key=len)
        batches = tqdm(range(0, len(captions), batch), desc="pooled embeddings", unit="batch")
        self.pooled_rows = torch.cat([encoders.pooled(captions[first : first + batch]).cpu() for first in batches])
        self.places = {caption: row for row, caption in enumerate(captions)}

    def pooled(self, captions: list[str]) -> Tensor:
        """[B, P]."""
        return self.pooled_rows[[self.places[caption] for caption in captions]]


class TwinStage:
    """What the stages of both twins share: a `module` with a transformer is scored, saved and loaded."""

    scale: str
    seed: int
    name: str
    module: nn.Module
    steps, guidance = 28, 4.0  # of its drawing

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """SceneEval, overall and by task."""
        teacher = Teacher(self.module.transformer)
        text = TwinText(load_text_encoders(get_scale(self.scale)).to(teacher.transformer.device))
        return scene_eval(teacher_generator(self.scale, teacher, text, self.steps, self.guidance), 50, seed=self.seed).figures()

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.transformer, root / self.name)
        save_reference(load_autoencoder(self.scale), root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        self.module.transformer.load_state_dict(load_transformer(root / self.name, self.name).state_dict())


class TeacherStage(TwinStage):
    """See `snapgen_core.train.Stage`."""

    name = "teacher"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        self.scale, self.seed = scale, seed
        torch.manual_seed(seed)
        self.module = TeacherTraining(build_twin(scale))
        self.before = 0  # see `Stage`
        self.settings = TrainSettings(batch_size=64, learning_rate=1e-3, steps=30_000)

    @cached_property
    def data(self) -> TeacherData:
        return TeacherData(self.scale, self.seed)

    @cached_property
    def student(self) -> SnapGenUNet:
        unet = load_unet(checkpoint_dir(self.scale) / "base").requires_grad_(False)
        return unet.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)

    def prepare(self) -> None:
        load_detector()  # as in stage base
        self.student, self.data  # noqa: B018

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        generator = step_generator(self.seed, step, rank)
        x0, captions = self.data.pick(self.settings.batch_size // world, generator)
        dropped = torch.rand(len(x0), generator=generator) < DROP_PROBABILITY
        context = fuse(*self.data.embeddings.gather(captions)).masked_fill(dropped[:, None, None], 0.0)
        pooled = self.data.pooled(captions).masked_fill(dropped[:, None], 0.0)
        eps = torch.randn(x0.shape, generator=generator)
        sigma = flow.sample_sigmas(len(x0), generator, get_scale(self.scale).shift)
        target = flow.velocity(x0, eps)
        imitates = (sigma < DETAIL) | (self.before + step < IMITATION)
        target[imitates] = self.imitate(flow.interpolate(x0, eps, sigma)[imitates], sigma[imitates], context[imitates])
        return {"x0": x0, "eps": eps, "target": target, "sigma": sigma, "context": context, "pooled": pooled}

    @torch.no_grad()
    def imitate(self, x_t: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The base student's velocities."""
        device = self.student.device
        return self.student(x_t.to(device), flow.TIMESTEPS * sigma.to(device), context.to(device)).sample.contiguous().cpu()
