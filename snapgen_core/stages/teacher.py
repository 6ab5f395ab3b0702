"""Stage `teacher`: the tiny twin of SD3.5's transformer learns the flow from scenes (Eq. 1-2), as the student did.

SD3.5 has seen far more pictures than SnapGen's student, and for far longer. Here that is a matter of the budget: on a GPU give
it more scenes and larger batches, as the command on the shipped teacher's card does.
"""

from functools import cached_property
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from .. import flow
from ..devices import best_device
from ..evaluate import load_detector, scene_eval, teacher_generator
from ..latents import load_autoencoder
from ..scales import get_scale
from ..teachers import StoredText, Teacher, TeacherText, TwinText, build_twin, load_transformer, save_reference
from ..text import load_text_encoders
from ..train import TrainSettings, step_generator
from ..weights import save_half
from .base import SCENES, TrainingSet, draw_prompts

class TeacherTraining(nn.Module):
    """forward(x0, eps [B,16,h,w], sigma [B], context [B,L,D], pooled [B,P]) -> (Eq. 2, figures)."""

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, x0: Tensor, eps: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        v = self.transformer(flow.interpolate(x0, eps, sigma), context, pooled, flow.TIMESTEPS * sigma).sample
        return flow.flow_matching_loss(v, x0, eps).mean(), {}


class TwinStage:
    """What the stages of both twins share: a `module` with a transformer is shown scenes, scored, saved and loaded."""

    scale: str
    seed: int
    name: str
    module: nn.Module
    scenes = SCENES
    steps, guidance = 28, 4.0  # of its drawing

    @cached_property
    def data(self) -> TrainingSet:
        return TrainingSet(self.scale, 0, self.scenes)

    @cached_property
    def text(self) -> TeacherText:
        return StoredText(self.data.embeddings)

    def prepare(self) -> None:
        load_detector()  # as in stage base
        self.text  # noqa: B018

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
    """See `snapgen_core.train.Stage`.

    Args:
        scenes: learn from the first so many; the student's are the first SCENES.
    """

    name = "teacher"

    def __init__(self, scale: str, seed: int, scenes: int = SCENES):
        self.scale, self.seed, self.scenes = scale, seed, scenes
        self.options = {} if scenes == SCENES else {"scenes": str(scenes)}
        torch.manual_seed(seed)
        self.module = TeacherTraining(build_twin(scale))
        self.settings = TrainSettings(batch_size=64, learning_rate=1e-3, steps=30_000)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        generator = step_generator(self.seed, step, rank, best_device())
        # Never one encoder alone: the base student has to work with any subset on a phone (Sec. 4), a teacher has all three.
        x0, prompts = draw_prompts(self.data, self.settings.batch_size // world, generator)
        context, pooled = self.text(prompts)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        sigma = flow.sample_sigmas(len(x0), generator, get_scale(self.scale).shift)
        return {"x0": x0, "eps": eps, "sigma": sigma, "context": context, "pooled": pooled}
