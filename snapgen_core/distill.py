"""Multi-level knowledge distillation with timestep-aware scaling (Sec. 3.3, Eq. 4-8).

Losses are kept for each sample, [B], until the very end: every sample has a timestep of its own, and Eq. 7 weighs by it.
As in `flow.flow_matching_loss` the norms are means over elements, which only rescales a loss; Eq. 7 takes the scale of a
distillation loss out again.

Four readings are ours, where the paper leaves room. In Eq. 7, t is the timestep before the time shift, the one that is
logit-normal; its "normalized" density is the one whose maximum is 1; and the magnitudes in the ratio are mean losses at t, as
Fig. 6 shows them, estimated from the samples that a process has. In Eq. 5, the "last layer" of a UNet is the last transformer
of its lowest resolution, where most of its transformers are.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


def output_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Eq. 4 for each sample: two velocities [B, C, h, w] -> [B]. No gradient reaches the teacher's."""
    return (teacher.detach() - student).square().flatten(1).mean(1)


class Projector(ModelMixin, ConfigMixin):
    """psi of Eq. 5: the student's features [B, C, h, w] as the teacher's, [B, D, H, W], by two convolutions. `size` is (H, W).

    The maps may differ in size: at 1024 pixels SD3.5 has 64x64 tokens, the UNet's lowest resolution is 32x32. The 3x3
    convolution works at the student's width and size, before the map is resized: at the teacher's width of 2432 it alone
    would have 53 million weights.
    """

    @register_to_config
    def __init__(self, student_channels: int, teacher_channels: int, size: tuple[int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(student_channels, student_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(student_channels, teacher_channels, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, D, H, W): from the student's channels to the teacher's features."""
        return self.config.student_channels, self.config.teacher_channels, *self.config.size

    def forward(self, features: Tensor) -> Tensor:
        x = F.silu(self.conv1(features))
        if tuple(x.shape[2:]) != tuple(self.config.size):
            x = F.interpolate(x, tuple(self.config.size), mode="bilinear", align_corners=False)
        return self.conv2(x)


def feature_loss(teacher: Tensor, projected: Tensor) -> Tensor:
    """Eq. 5 for each sample and one pair of layers: features [B, D, H, W] -> [B]. No gradient reaches the teacher's."""
    if teacher.shape != projected.shape:
        raise ValueError(f"the teacher's features are {list(teacher.shape)}, the student's projected {list(projected.shape)}")
    return (teacher.detach() - projected).square().flatten(1).mean(1)


def task_weight(t: Tensor) -> Tensor:
    """lambda(t) of Eq. 7: the density of a standard logit-normal variable over its maximum, which is at t = 1/2.

    The density is exp(-logit(t)^2 / 2) / (sqrt(2 pi) t (1 - t)), and 4 / sqrt(2 pi) at 1/2. Zero at both ends.
    `t` in [0, 1] is the timestep before the time shift, the one that training draws from this very density.
    """
    inside = t.clamp(1e-6, 1 - 1e-6)
    return torch.exp(-torch.logit(inside).square() / 2) / (4 * inside * (1 - inside))


def mean_near(losses: Tensor, t: Tensor, width: float = 0.5) -> Tensor:
    """The mean loss at each sample's timestep, [B], from losses [B] at timesteps t [B]: those nearby count, too.

    Distances are taken in logit(t), where the timesteps of a batch are standard normal, with a Gaussian of this `width`. A
    sample alone would say how lucky it was, not how large the loss is at its timestep.
    """
    place = torch.logit(t.clamp(1e-6, 1 - 1e-6))
    near = torch.softmax(-(place[:, None] - place).square() / (2 * width**2), dim=1)  # (B, B), rows sum to 1
    return (near * losses).sum(dim=1)  # not a matrix product, which autocast would round to 16 bits


def scaled(task: Tensor, distillation: Tensor, t: Tensor) -> Tensor:
    """S of Eq. 7: task loss [B] and distillation loss [B] at timesteps t [B] -> scalar.

    |L_task| / |L_kd| is taken at each sample's timestep and carries no gradient: it brings the distillation loss and its
    gradient to the task's scale there.
    """
    weight = task_weight(t)
    ratio = mean_near(task.detach(), t) / mean_near(distillation.detach(), t).clamp(min=1e-12)
    return (weight * task + (1 - weight) * ratio * distillation).mean()


def multi_level(task: Tensor, outputs: Tensor, features: Tensor, t: Tensor) -> Tensor:
    """L_MD of Eq. 8, from losses [B]."""
    return scaled(task, outputs, t) + scaled(task, features, t)


def constant_weights(task: Tensor, outputs: Tensor, features: Tensor, output_weight: float, feature_weight: float) -> Tensor:
    """The baseline of Eq. 6, from losses [B]."""
    return (task + output_weight * outputs + feature_weight * features).mean()
