"""Stage `base`: the student learns the rectified flow from captioned latents (Sec. 3.3, Eq. 1-2)."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import flow
from ..data import SceneLatents
from ..devices import best_device, has_room
from ..evaluate import evaluate_unet, load_detector
from ..latents import load_autoencoder
from ..paths import cache_dir
from ..pipeline import load_unet
from ..scales import get_scale
from ..text import EmbeddingStore, drop_encoders, fuse, load_text_encoders
from ..train import TrainSettings, step_generator
from ..unet import SnapGenUNet
from ..weights import save_half

DROP_WHOLE = 0.1  # how often the stages with a teacher drop the whole text; here that comes of dropping each encoder (Sec. 4)
SCENES = 65_536  # scenes in the cached training set; their text embeddings take about 1 GB of memory


class BaseTraining(nn.Module):
    """forward(x0, eps [B,16,h,w], sigma [B], context [B,L,D]) -> (Eq. 2, figures)."""

    def __init__(self, unet: SnapGenUNet):
        super().__init__()
        self.unet = unet

    def forward(self, x0: Tensor, eps: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        v = self.unet(flow.interpolate(x0, eps, sigma), flow.TIMESTEPS * sigma, context).sample
        return flow.flow_matching_loss(v, x0, eps).mean(), {}


class TrainingSet:
    """Latents and text embeddings of the training scenes, computed once and cached on disk."""

    def __init__(self, scale: str, seed: int, count: int = SCENES, progress: bool = True):
        config, device = get_scale(scale), best_device()
        self.scenes = SceneLatents(load_autoencoder(scale).to(device), cache_dir(scale), count, seed, config.image_size, progress)
        self.embeddings = EmbeddingStore(load_text_encoders(config).to(device), cache_dir(scale))
        self.embeddings.add(["", *self.scenes.captions], progress=progress)  # "" is a twin's unconditional prompt
        home = device if has_room(device, self.scenes.latents.nbytes + self.embeddings.nbytes) else "cpu"
        self.scenes.latents, self.embeddings = self.scenes.latents.to(home), self.embeddings.to(home)

    def pick(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents [B,16,h,w], on the device of `generator`, and captions of random scenes."""
        latents, device = self.scenes.latents, generator.device
        rows = torch.randint(len(latents), (count,), generator=generator, device=device)
        return latents[rows.to(latents.device)].to(device).float(), [self.scenes.captions[i] for i in rows.tolist()]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """The same with the captions' context [B,L,D] between: each text encoder is dropped independently (Sec. 4)."""
        latents, captions = self.pick(count, generator)
        return latents, fuse(*drop_encoders(self.embeddings.gather(captions), generator=generator)), captions


def draw_prompts(data: TrainingSet, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Latents [B,16,h,w] and prompts of random scenes; one prompt in ten is "", for guidance."""
    latents, captions = data.pick(count, generator)
    dropped = torch.rand(count, generator=generator, device=generator.device) < DROP_WHOLE
    return latents, ["" if drop else caption for caption, drop in zip(captions, dropped.tolist())]


def draw_batch(data: TrainingSet, count: int, generator: torch.Generator, shift: float) -> tuple[dict[str, Tensor], list[str]]:
    """What `BaseTraining` takes: random scenes of `data`, fresh noise, and noise levels of Sec. 4. And the scenes' captions."""
    x0, context, captions = data.draw(count, generator)
    eps = torch.randn(x0.shape, generator=generator, device=generator.device)
    return {"x0": x0, "eps": eps, "sigma": flow.sample_sigmas(count, generator, shift), "context": context}, captions


class BaseStage:
    """See `snapgen_core.train.Stage`."""

    name = "base"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        self.scale, self.seed = scale, seed
        torch.manual_seed(seed)
        self.module = BaseTraining(SnapGenUNet.from_preset(scale)).to(memory_format=torch.channels_last)
        self.settings = TrainSettings(batch_size=64, learning_rate=8e-4, steps=60_000)

    @cached_property
    def data(self) -> TrainingSet:
        return TrainingSet(self.scale, self.seed)

    def prepare(self) -> None:
        load_detector()  # its absence should not come to light after the training, when the student is scored
        self.data  # noqa: B018

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        generator = step_generator(self.seed, step, rank, best_device())
        return draw_batch(self.data, self.settings.batch_size // world, generator, get_scale(self.scale).shift)[0]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """SceneEval at 28 guided steps, overall and by task."""
        return evaluate_unet(self.scale, self.module.unet, images=50, seed=self.seed)

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.unet, root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        self.module.unet.load_state_dict(load_unet(root / self.name).state_dict())
