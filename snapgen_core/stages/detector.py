"""Stage `detector`: the judge of SceneEval learns to find, name and colour the objects of emoji scenes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..detector import Detector, detection_loss
from ..errors import UserError
from ..evaluate import load_detector, validate_detector
from ..train import TrainSettings
from ..weights import save_half
from .hard_scenes import draw_example, to_targets


class DetectorTraining(nn.Module):
    """forward(image [B,3,64,64], objects [N,7], weight [B,classes,16,16]) -> (loss, figures); see `detection_loss`."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor, objects: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return detection_loss(self.detector(image), objects, weight)


class DetectorStage:
    """See `snapgen_core.train.Stage`. There is one detector for all scales: it looks at 64 px."""

    name = "detector"
    options: dict[str, str] = {}

    def __init__(self, scale: str, seed: int):
        if scale != "tiny":
            raise UserError(f"scale {scale} is judged by tiny's detector: train it with --scale tiny")
        self.scale, self.seed = scale, seed
        torch.manual_seed(seed)
        self.module = DetectorTraining(Detector()).to(memory_format=torch.channels_last)
        self.settings = TrainSettings(batch_size=64, learning_rate=1e-3, betas=(0.9, 0.99), steps=3000)

    def prepare(self) -> None:
        pass  # scenes are drawn as they are needed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        first = step * self.settings.batch_size
        examples = [draw_example(self.seed, i) for i in range(first + rank, first + self.settings.batch_size, world)]
        objects, weight = to_targets(examples)
        image = torch.stack([example.image for example in examples])
        return {"image": image.contiguous(memory_format=torch.channels_last), "objects": objects, "weight": weight}

    def score(self) -> dict[str, float]:
        """Shares of unseen true scenes judged right and of wrong captions accepted, sharp and blurred with 1 px."""
        sharp = validate_detector(self.module.detector, per_task=200, seed=self.seed)
        blurred = validate_detector(self.module.detector, per_task=100, seed=self.seed, blur=1.0)
        return {**sharp, **{f"blurred_{name}": value for name, value in blurred.items()}}

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.detector, root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        self.module.detector.load_state_dict(load_detector(root / self.name).state_dict())
