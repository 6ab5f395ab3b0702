"""What the detector learns from: emoji scenes, and harder ones that a judge of generated images must not fall for.

Half of the examples are standard scenes. The other half place objects anywhere, in any size and number, overlapping
or leaving the picture, beside emoji of no class and beside things that look half right: cut, holed, faded, smeared,
jumbled, or two classes blended. One rule says what counts: an object is there when at least `COUNTS` of its opaque
area is to be seen as it should be, it is not there below `GONE`, and between the two nothing is asked of the detector.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..detector import CELLS, IMAGE_SIZE, STRIDE, blur_matrix, gaussian_blur, seen_colour
from ..scenes import CLASSES, COLOURS, OBJECTS, TRAIN_MIX, background, draw_scene, plain_names, premultiplied

COUNTS, GONE = 0.8, 0.55

_STANDARD_MIX = {task: weight for task, weight in TRAIN_MIX.items() if task != "plain"}
_HELD_OUT_SHARE = 0.2  # the judge must know the pairs that the student never sees
_HELD_OUT_SEED = 7_368_787  # ... but not the very scenes on which it is scored
_LARGEST = {1: 0.8, 2: 0.6, 3: 0.5, 4: 0.44, 5: 0.38}  # side of the largest object, by number of objects
_SMALLEST = 0.26


@dataclass(frozen=True)
class Label:
    """An object of which `share` is seen: class and colour numbers, box (left, top, right, bottom) in pixels."""

    name: int
    colour: int
    box: tuple[float, float, float, float]
    share: float


@dataclass(frozen=True)
class Example:
    """`image` [3, 64, 64] in [-1, 1] and its labels, the uncertain and absent ones included."""

    image: Tensor
    labels: tuple[Label, ...]


def colour_number(name: str, colour: str | None) -> int:
    """Index into COLOURS; the next one is natural."""
    shade = seen_colour(name, colour)
    return COLOURS.index(shade) if shade else len(COLOURS)


@lru_cache(maxsize=1)
def distractors() -> tuple[str, ...]:
    """Emoji that show none of the classes. Names that share a word with a class or with its emoji are left out: a dog
    face is a dog, a green book is a book, and a heart with an arrow is arguable."""
    known = {word for name, forms in OBJECTS.items() for text in (name, *forms) for word in text.split()}
    known -= {"red", "running", "closed", "top", "alarm"}
    return tuple(name for name in plain_names() if not known & set(re.findall(r"[a-z]+", name.lower())))


# ------------------------------------------------------------------------------------------------- single objects


@dataclass
class _Layer:
    """Something to paste: premultiplied colour [h, w, 3] in 0..255, alpha [h, w, 1] in 0..1, opaque area when whole,
    and (class, colour, share) of what it shows."""

    colour: np.ndarray
    alpha: np.ndarray
    area: float
    shows: list[tuple[int, int, float]]


def _layer(rng: np.random.Generator, name: str, colour: str | None, side: int) -> _Layer:
    """A whole object or, for an emoji of no class, a distractor."""
    pixels, alpha = premultiplied(name, colour, side)
    if rng.random() < 0.15:
        pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
    alpha = alpha.astype(np.float32) / 255
    shows = [(CLASSES.index(name), colour_number(name, colour), 1.0)] if name in CLASSES else []
    return _Layer(pixels.astype(np.float32), alpha, float(alpha.sum()), shows)


def _veil(layer: _Layer, mask: np.ndarray) -> _Layer:
    """Let through the share `mask` [h, w, 1] of every pixel."""
    seen = float((layer.alpha * mask).sum()) / max(layer.area, 1e-6)
    return _Layer(layer.colour * mask, layer.alpha * mask, layer.area, [(n, c, s * seen) for n, c, s in layer.shows])


def _cut(rng: np.random.Generator, layer: _Layer) -> _Layer:
    """Erase what lies beyond a line, more or less sharply."""
    height, width = layer.alpha.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    mask = np.clip(0.5 + (ramp - rng.uniform(-0.2, 0.2)) / rng.uniform(0.02, 0.3), 0, 1)
    return _veil(layer, mask[..., None].astype(np.float32))


def _hole(rng: np.random.Generator, layer: _Layer) -> _Layer:
    """Erase two to four discs."""
    height, width = layer.alpha.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    mask = np.ones((height, width), np.float32)
    for _ in range(rng.integers(2, 5)):
        radius = rng.uniform(0.15, 0.32) * max(height, width)
        distance = np.hypot(x - rng.uniform(0.1, 0.9) * width, y - rng.uniform(0.1, 0.9) * height)
        mask *= np.clip(distance - radius, 0, 1)
    return _veil(layer, mask[..., None])


def _fade(rng: np.random.Generator, layer: _Layer) -> _Layer:
    return _veil(layer, np.float32(rng.uniform(0.1, 0.6)) * np.ones_like(layer.alpha))


def _smear(rng: np.random.Generator, layer: _Layer) -> _Layer:
    """Blur until only a blob of its colours is left."""
    height, width = layer.alpha.shape[:2]
    sigma = rng.uniform(0.14, 0.3) * max(height, width)
    down, across = blur_matrix(height, sigma).numpy(), blur_matrix(width, sigma).numpy()
    both = np.concatenate([layer.colour, layer.alpha], -1)
    both = np.einsum("yv,vuc,xu->yxc", down, both, across, optimize=True)
    return _Layer(both[..., :3], both[..., 3:], layer.area, [])


def _jumble(rng: np.random.Generator, layer: _Layer) -> _Layer:
    """Exchange the quarters. What then looks nearly the same (a book does) is uncertain, anything else is gone."""
    height, width = (side // 2 * 2 for side in layer.alpha.shape[:2])
    order = rng.permutation(4)
    while (order == np.arange(4)).sum() > 1:
        order = rng.permutation(4)
    whole = np.concatenate([layer.colour, layer.alpha], -1)[:height, :width]
    quarters = [half for row in np.split(whole, 2, axis=0) for half in np.split(row, 2, axis=1)]
    a, b, c, d = (quarters[i] for i in order)
    mixed = np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)], 0)
    on_grey = [p[..., :3] + 200 * (1 - p[..., 3:]) for p in (whole, mixed)]
    change = np.abs(on_grey[0] - on_grey[1]).sum() / (3 * layer.area)  # grey levels a pixel
    shows = [(n, c, s * GONE) for n, c, s in layer.shows] if change < 20 else []
    return _Layer(mixed[..., :3], mixed[..., 3:], layer.area, shows)


def _blend(rng: np.random.Generator, layer: _Layer) -> _Layer:
    """Lay another object into the same place; each is half seen."""
    first = layer.shows[0][0]
    another = CLASSES[(first + rng.integers(1, len(CLASSES))) % len(CLASSES)]
    other = _layer(rng, another, _some_colour(rng), max(layer.alpha.shape[:2]))
    weight = np.float32(rng.uniform(0.35, 0.65))
    height, width = (max(a, b) for a, b in zip(layer.alpha.shape[:2], other.alpha.shape[:2]))
    mixed = np.zeros((height, width, 4), np.float32)
    for part, share in ((layer, weight), (other, 1 - weight)):
        h, w = part.alpha.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        mixed[top : top + h, left : left + w] += share * np.concatenate([part.colour, part.alpha], -1)
    shows = [(n, c, s * float(weight)) for n, c, s in layer.shows]
    shows += [(n, c, s * float(1 - weight)) for n, c, s in other.shows]
    return _Layer(mixed[..., :3], mixed[..., 3:], float(mixed[..., 3].sum()), shows)


def _broken(rng: np.random.Generator, layer: _Layer) -> _Layer:
    kinds = (_cut, _hole, _fade, _smear, _jumble, _blend)
    kind = kinds[rng.choice(len(kinds), p=(0.25, 0.2, 0.15, 0.1, 0.1, 0.2))]
    return kind(rng, layer)


def _some_colour(rng: np.random.Generator) -> str | None:
    return None if rng.random() < 0.5 else COLOURS[rng.integers(len(COLOURS))]


# ------------------------------------------------------------------------------------------------- whole pictures


def _free_layers(rng: np.random.Generator) -> list[_Layer]:
    """Zero to five objects, distractors and broken things; in half of the pictures of one class, for counting."""
    count = int(rng.choice(6, p=(0.06, 0.24, 0.25, 0.2, 0.15, 0.1)))
    shared = (CLASSES[rng.integers(len(CLASSES))], _some_colour(rng)) if rng.random() < 0.5 else None
    layers = []
    for _ in range(count):
        side = round(rng.uniform(_SMALLEST, _LARGEST[count]) * IMAGE_SIZE)
        kind = rng.random()
        if kind < 0.2:
            names = distractors()
            layers.append(_layer(rng, names[rng.integers(len(names))], None, side))
            continue
        name, colour = shared or (CLASSES[rng.integers(len(CLASSES))], _some_colour(rng))
        layer = _layer(rng, name, colour, side)
        layers.append(_broken(rng, layer) if kind < 0.4 else layer)
    return layers


def _put(rng: np.random.Generator, layer: _Layer, taken: list[tuple[float, float, float]]) -> tuple[int, int] | None:
    """Top left corner in pixels, up to a tenth of the object outside; None where it would hide another."""
    height, width = layer.alpha.shape[:2]
    for _ in range(12):
        left = int(np.clip(rng.uniform(-0.1 * width, IMAGE_SIZE - 0.9 * width), -width // 2, IMAGE_SIZE))
        top = int(np.clip(rng.uniform(-0.1 * height, IMAGE_SIZE - 0.9 * height), -height // 2, IMAGE_SIZE))
        x, y, side = left + width / 2, top + height / 2, max(height, width)
        if all(max(abs(x - ox), abs(y - oy)) > 0.42 * (side + oside) for ox, oy, oside in taken):
            taken.append((x, y, side))
            return left, top
    return None


def draw_free_scene(rng: np.random.Generator) -> Example:
    """Objects anywhere on a background of the scenes; later ones hide earlier ones."""
    canvas = background(rng, IMAGE_SIZE)
    seen: list[tuple[_Layer, tuple[float, float, float, float], np.ndarray]] = []  # with each pixel's visible alpha
    taken: list[tuple[float, float, float]] = []
    for layer in _free_layers(rng):
        corner = _put(rng, layer, taken)
        if corner is None:
            continue
        (left, top), (height, width) = corner, layer.alpha.shape[:2]
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, IMAGE_SIZE), min(top + height, IMAGE_SIZE)
        inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        alpha = layer.alpha[inside]
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + layer.colour[inside]
        for _, _, visible in seen:
            visible[y0:y1, x0:x1] *= 1 - alpha[..., 0]
        visible = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        visible[y0:y1, x0:x1] = alpha[..., 0]
        seen.append((layer, (x0, y0, x1, y1), visible))
    labels = []
    for layer, box, visible in seen:
        left_over = float(visible.sum()) / max(float(layer.alpha.sum()), 1e-6)
        labels += [Label(name, colour, box, share * left_over) for name, colour, share in layer.shows]
    image = torch.from_numpy(np.ascontiguousarray(canvas.clip(0, 255).transpose(2, 0, 1), dtype=np.float32))
    return Example(image / 127.5 - 1, tuple(labels))


def _clouds(rng: np.random.Generator) -> Example:
    """Noise, from grain to soft clouds: what a generator draws before it has learnt anything."""
    noise = torch.from_numpy(rng.standard_normal((3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32))
    noise = gaussian_blur(noise, rng.integers(13) / 2)
    base = torch.tensor(rng.uniform(-0.5, 1, (3, 1, 1)), dtype=torch.float32)
    return Example((base + noise / noise.std() * float(rng.uniform(0.1, 0.6))).clamp(-1, 1), ())


def _standard_scene(rng: np.random.Generator, seed: int, index: int) -> Example:
    if rng.random() < _HELD_OUT_SHARE:
        scene = draw_scene(seed + _HELD_OUT_SEED, index, "held_out", size=IMAGE_SIZE)
    else:
        scene = draw_scene(seed, index, "train", size=IMAGE_SIZE, mix=_STANDARD_MIX)
    labels = [Label(CLASSES.index(o.name), colour_number(o.name, o.colour), o.box, 1.0) for o in scene.objects]
    return Example(scene.image, tuple(labels))


# ------------------------------------------------------------------------------------------------- image defects


def _spoil(rng: np.random.Generator, image: Tensor) -> Tensor:
    """What an autoencoder or a generator does to a picture: soft edges, off colours, grain. image [3, H, W]."""
    if rng.random() < 0.7:
        image = gaussian_blur(image, rng.integers(25) / 20)  # 0 to 1.2 px; few values, so that their matrices are kept
    gain = torch.tensor(rng.uniform(0.9, 1.08) * rng.uniform(0.96, 1.04, 3), dtype=torch.float32)
    shift = torch.tensor(rng.uniform(-0.05, 0.05) + rng.uniform(-0.03, 0.03, 3), dtype=torch.float32)
    grain = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32)) * float(rng.uniform(0, 0.06))
    return (image * gain[:, None, None] + shift[:, None, None] + grain).clamp(-1, 1)


def draw_example(seed: int, index: int) -> Example:
    """Training example number `index`, a pure function of its arguments."""
    rng = np.random.default_rng([11, seed, index])
    kind = rng.random()
    example = _standard_scene(rng, seed, index) if kind < 0.5 else draw_free_scene(rng) if kind < 0.97 else _clouds(rng)
    return Example(_spoil(rng, example.image), example.labels)


def to_targets(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Labels as tensors: objects [N, 7] that count (image, class, colour, centre x, centre y, width, height; lengths
    in cells) and weight [B, classes, 16, 16], zero where an uncertain object lies."""
    objects, weight = [], torch.ones(len(examples), len(CLASSES), CELLS, CELLS)
    for i, example in enumerate(examples):
        for label in example.labels:
            x0, y0, x1, y1 = (side / STRIDE for side in label.box)
            if label.share >= COUNTS:
                objects.append((i, label.name, label.colour, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
            elif label.share >= GONE:
                weight[i, label.name, int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = 0
    return torch.tensor(objects, dtype=torch.float32).reshape(-1, 7), weight
