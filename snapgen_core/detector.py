"""The judge's eye: a small anchor-free detector for emoji scenes.

A scene is a set of points with a class, a colour and a box ["Objects as Points", Zhou et al. 2019]: every class has
a heatmap whose peaks are object centres; beside it one head gives the box, another the colour. GenEval uses
Mask2Former and CLIP for the two jobs; here one network of 0.9 M parameters does both. It always looks at 64 px.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .scenes import CLASSES, COLOURS

IMAGE_SIZE = 64
STRIDE = 4
CELLS = IMAGE_SIZE // STRIDE
MAX_BOXES = 16  # a class, as in GenEval
THRESHOLD = 0.3  # as in GenEval
OVERLAP = 0.5  # intersection over union from which two boxes are the same object

# Sprites that everybody calls by one colour: drawn naturally, they are that colour too (a star is a yellow star).
# GenEval's colour classifier has no answer "natural" either. All others are "natural" unless recoloured.
NATURAL_COLOURS = {
    "apple": "red",
    "banana": "yellow",
    "book": "red",
    "carrot": "orange",
    "fish": "blue",
    "heart": "red",
    "key": "yellow",
    "star": "yellow",
    "strawberry": "red",
    "tree": "green",
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object found; `colour` None is natural, `box` is (left, top, right, bottom) in pixels of a 64 px image."""

    name: str
    colour: str | None
    box: Box
    score: float


def seen_colour(name: str, colour: str | None) -> str | None:
    """The colour that a viewer would name for an object drawn in `colour` (None: naturally)."""
    return colour or NATURAL_COLOURS.get(name)


# ------------------------------------------------------------------------------------------------- blur


@lru_cache(maxsize=256)
def blur_matrix(size: int, sigma: float) -> torch.Tensor:
    """Gaussian blur along one axis of `size` pixels as a matrix, [size, size]; rows sum to 1, so edges do not
    darken. `sigma` in pixels."""
    position = torch.arange(size, dtype=torch.float32)
    weights = torch.exp(-((position[:, None] - position) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    return weights / weights.sum(-1, keepdim=True)


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """images [..., H, W] blurred with `sigma` pixels."""
    down, across = (blur_matrix(side, sigma).to(images) for side in images.shape[-2:])
    return down @ images @ across.transpose(-1, -2)


# ------------------------------------------------------------------------------------------------- network


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions around a residual; [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class Downsample(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm = _norm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


class Detector(ModelMixin, ConfigMixin):
    """images [B, 3, 64, 64] in [-1, 1] -> heat logits [B, classes, 16, 16], boxes [B, 4, 16, 16] and colour logits
    [B, colours + 1, 16, 16] (the last colour is natural). A box is (dx, dy, width, height) in cells; (dx, dy) leads
    from the cell's corner to the centre."""

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, int, int] = (32, 64, 112),
        deep_blocks: int = 3,
        classes: tuple[str, ...] = CLASSES,
        colours: tuple[str, ...] = COLOURS,
    ):
        super().__init__()
        low, middle, deep = widths
        self.fine = nn.Sequential(Downsample(3, low), Downsample(low, middle), ConvBlock(middle))  # 16x16
        self.coarse = nn.Sequential(Downsample(middle, deep), *(ConvBlock(deep) for _ in range(deep_blocks)))  # 8x8
        self.lateral = nn.Conv2d(deep, middle, 1)
        self.merge = ConvBlock(middle)
        self.heat = self._head(middle, len(classes))
        self.box = self._head(middle, 4)
        self.colour = self._head(middle, len(colours) + 1)
        # A rare class: start at probability 0.02, so that the empty cells do not drown the first steps.
        nn.init.constant_(self.heat[-1].bias, -3.9)

    @staticmethod
    def _head(channels: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, outputs, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"expected images [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
        fine = self.fine(images)
        coarse = F.interpolate(self.lateral(self.coarse(fine)), scale_factor=2, mode="nearest")
        h = self.merge(fine + coarse)
        return self.heat(h), self.box(h), self.colour(h)

    @torch.no_grad()
    def detect(self, images: torch.Tensor, threshold: float = THRESHOLD) -> list[list[Detection]]:
        """images [B, 3, H, W] in [-1, 1] -> for each image its objects scored above `threshold`, best first.

        Images of another size are reduced to 64 px; boxes are in pixels of that 64 px image.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images [B, 3, H, W], got {list(images.shape)}")
        images = images.to(self.device, self.dtype)
        if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        heat, box, colour = self(images.clamp(-1, 1))
        return decode(heat.float().sigmoid().cpu(), box.float().cpu(), colour.float().cpu(), threshold)


# ------------------------------------------------------------------------------------------------- decoding


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def suppress(detections: list[Detection]) -> list[Detection]:
    """Keep the best-scored of boxes that overlap by half or more, whatever their class, and at most 16 a class."""
    kept: list[Detection] = []
    for found in sorted(detections, key=lambda d: -d.score):
        same_class = sum(other.name == found.name for other in kept)
        if same_class < MAX_BOXES and all(overlap(found.box, other.box) < OVERLAP for other in kept):
            kept.append(found)
    return kept


def decode(heat: torch.Tensor, box: torch.Tensor, colour: torch.Tensor, threshold: float) -> list[list[Detection]]:
    """Peaks of heat [B, classes, 16, 16] (probabilities: a cell above `threshold` and its eight neighbours) with
    their box [B, 4, 16, 16] and colour logits [B, colours + 1, 16, 16]."""
    peaks = (heat == F.max_pool2d(heat, 3, stride=1, padding=1)) & (heat > threshold)
    found: list[list[Detection]] = [[] for _ in range(len(heat))]
    for b, c, y, x in peaks.nonzero().tolist():
        dx, dy, width, height = box[b, :, y, x].tolist()
        cx, cy = x + dx, y + dy
        half_w, half_h = max(width, 0.5) / 2, max(height, 0.5) / 2
        corners = (cx - half_w, cy - half_h, cx + half_w, cy + half_h)
        pixels = tuple(min(max(STRIDE * corner, 0.0), float(IMAGE_SIZE)) for corner in corners)
        shade = int(colour[b, :, y, x].argmax())
        name = COLOURS[shade] if shade < len(COLOURS) else None
        found[b].append(Detection(CLASSES[c], name, pixels, heat[b, c, y, x].item()))
    return [suppress(detections) for detections in found]


# ------------------------------------------------------------------------------------------------- loss


def heat_targets(objects: torch.Tensor, batch: int) -> torch.Tensor:
    """objects [N, 7] (image, class, colour, centre x, centre y, width, height; lengths in cells) -> target heatmaps
    [batch, classes, 16, 16]: a bump of height 1 at the centre's cell, wider for larger objects; the maximum of all."""
    cells = torch.arange(CELLS, device=objects.device, dtype=objects.dtype)
    column, row = objects[:, 3].floor().clamp(0, CELLS - 1), objects[:, 4].floor().clamp(0, CELLS - 1)
    sigma = objects[:, 5:7].amax(1) / 12 + 0.2
    distance = (cells - column[:, None])[:, None, :] ** 2 + (cells - row[:, None])[:, :, None] ** 2  # (N, 16, 16)
    bumps = torch.exp(-distance / (2 * sigma**2)[:, None, None])
    plane = objects[:, 0].long() * len(CLASSES) + objects[:, 1].long()
    heat = torch.zeros(batch * len(CLASSES), CELLS * CELLS, device=objects.device, dtype=objects.dtype)
    heat.scatter_reduce_(0, plane[:, None].expand(-1, CELLS * CELLS), bumps.flatten(1), "amax")
    return heat.view(batch, len(CLASSES), CELLS, CELLS)


def focal_loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CenterNet's focal loss, summed, over the number of centres. Arguments [B, classes, 16, 16]; cells of weight 0
    are left out; cells near a centre (target close to 1) are punished less."""
    p = logits.sigmoid()
    centre = (target == 1).to(p.dtype)
    hit = centre * (1 - p) ** 2 * F.logsigmoid(logits)
    miss = (1 - centre) * (1 - target) ** 4 * p**2 * F.logsigmoid(-logits)
    return -(weight * (hit + miss)).sum() / centre.sum().clamp(min=1)


def detection_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], objects: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Focal loss on heatmaps + 0.25 L1 on boxes + cross-entropy on colours. `objects` as in `heat_targets`, `weight`
    [B, classes, 16, 16]. Boxes and colours learn at the nine cells around a centre: a peak may be one cell off."""
    heat, box, colour = (output.float() for output in outputs)  # half precision would lose the faint cells
    heat_loss = focal_loss(heat, heat_targets(objects, len(heat)), weight)
    steps = torch.tensor([-1, 0, 1], device=heat.device)
    column = (objects[:, 3, None].floor().long() + steps.repeat(3)).clamp(0, CELLS - 1)  # (N, 9)
    row = (objects[:, 4, None].floor().long() + steps.repeat_interleave(3)).clamp(0, CELLS - 1)
    image = objects[:, 0, None].long().expand_as(row)
    offset = torch.stack([objects[:, 3, None] - column, objects[:, 4, None] - row], -1)
    wanted = torch.cat([offset, objects[:, None, 5:7].expand(-1, 9, -1)], -1)  # (N, 9, 4)
    count = max(objects.shape[0] * 9, 1)
    box_loss = (box[image, :, row, column] - wanted).abs().sum() / count
    shades = colour[image, :, row, column].flatten(0, 1)
    colour_loss = F.cross_entropy(shades, objects[:, 2].long().repeat_interleave(9), reduction="sum") / count
    loss = heat_loss + 0.25 * box_loss + colour_loss
    return loss, {"heat": heat_loss.detach(), "box": box_loss.detach(), "colour": colour_loss.detach()}
