"""What the training loop needs of a stage, and what it gives each step to be random with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs to know. Betas, weight decay and the average's decay follow Supplement G. Ours are the learning
    rate, set per stage (the paper's 5e-5 belongs to a total batch of 1024 and a long run), and, for higher rates than the
    paper's, a warm-up, clipped gradients, and, where batches are small beside a loss's noise, a cool-down."""

    batch_size: int  # over all processes
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float | None = 1.0  # None: gradients are left as they are
    warmup_steps: int = 100
    cooldown: float = 0.0  # share of a run's steps, its last ones, in which the rates fall to zero in a straight line
    steps: int = 10_000  # the whole stage, where no budget is given
    turns: bool = False  # players take turns: in any step some parameters have no gradient
    rates: tuple[tuple[str, float], ...] = ()  # learning rates of their own: (how the parameters' names begin, rate)

    def share_of_rate(self, step: int, total: int) -> float:
        """What part of the learning rate step number `step` of `total` has. A run of so many minutes knows no total, and does
        not cool down."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps), (total - step) / max(1.0, self.cooldown * total))


class Stage(Protocol):
    """What the loop needs of a stage (`snapgen_core.stages` holds one file each)."""

    name: str
    scale: str
    seed: int
    settings: TrainSettings
    options: dict[str, str]  # of `snapgen train`, beside seed and scale, that decide on the batches: {"data": FOLDER}
    module: nn.Module  # all that is trained; forward(**batch) returns (loss, {figure: scalar tensor})

    def prepare(self) -> None:
        """Make or load what `batch` reads; called once, before the clock starts."""

    def batch(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        """This process's share of batch number `step`; a pure function of (seed, step, rank, world)."""

    def score(self) -> dict[str, float]:
        """Figures for the card, with the weights now in `module`."""

    def save(self, root: Path) -> list[Path]:
        """Write the shipped layout below `root` and return the folders written."""

    def load(self, root: Path) -> None:
        """The inverse of `save`, for a warm start. Raises UserError where the shipped weights are not all of them."""

    # A stage may also have `watch(run_dir, step, average)`: called in the main process before the first step and after each
    # checkpoint, with the averaged state of `module`, it looks at how the training goes.


def step_generator(seed: int, step: int, rank: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of everything random in one step. Other devices draw other numbers, so a run is to be resumed on the kind
    of device on which it began."""
    mixed = (seed * 1_000_003 + step) * 4_099 + rank
    return torch.Generator(device).manual_seed(mixed % 2**63)
