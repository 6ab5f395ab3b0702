"""Emoji scenes: captioned pictures whose truth is known.

Every scene is a pure function of (seed, index, split): nothing is stored, nothing runs out, and a resumed
training sees exactly what it would have seen. Captions follow GenEval's six tasks [Ghosh et al. 2023] plus plain
emoji names. An object keeps its natural colours unless the caption names one; then it is a duotone of that colour.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from PIL import Image

from .errors import UserError, reason
from .paths import data_dir

# class name -> (emoji name, plural)
OBJECTS = {
    "dog": ("dog", "dogs"),
    "rabbit": ("rabbit", "rabbits"),
    "elephant": ("elephant", "elephants"),
    "bird": ("bird", "birds"),
    "fish": ("fish", "fish"),
    "turtle": ("turtle", "turtles"),
    "butterfly": ("butterfly", "butterflies"),
    "penguin": ("penguin", "penguins"),
    "car": ("automobile", "cars"),
    "airplane": ("airplane", "airplanes"),
    "rocket": ("rocket", "rockets"),
    "boat": ("speedboat", "boats"),
    "apple": ("red apple", "apples"),
    "banana": ("banana", "bananas"),
    "carrot": ("carrot", "carrots"),
    "strawberry": ("strawberry", "strawberries"),
    "pizza": ("pizza", "pizzas"),
    "mushroom": ("mushroom", "mushrooms"),
    "hat": ("top hat", "hats"),
    "shoe": ("running shoe", "shoes"),
    "umbrella": ("umbrella", "umbrellas"),
    "guitar": ("guitar", "guitars"),
    "key": ("key", "keys"),
    "book": ("closed book", "books"),
    "clock": ("alarm clock", "clocks"),
    "crown": ("crown", "crowns"),
    "star": ("star", "stars"),
    "heart": ("red heart", "hearts"),
    "balloon": ("balloon", "balloons"),
    "house": ("house", "houses"),
    "tree": ("deciduous tree", "trees"),
    "flower": ("tulip", "flowers"),
}
# colour -> its (dark, middle, light) shades in sRGB, 0..255
_SHADES = {
    "red": ((110, 8, 20), (222, 32, 40), (255, 128, 122)),
    "orange": ((150, 66, 0), (246, 136, 16), (255, 196, 120)),
    "yellow": ((200, 158, 0), (248, 214, 36), (255, 244, 160)),
    "green": ((10, 78, 26), (46, 168, 62), (148, 226, 150)),
    "blue": ((10, 36, 120), (40, 98, 232), (136, 182, 255)),
    "purple": ((62, 14, 104), (136, 58, 202), (204, 158, 246)),
    "pink": ((168, 52, 112), (250, 126, 190), (255, 206, 230)),
    "black": ((6, 6, 10), (40, 40, 48), (112, 112, 122)),
}
_PASTELS = ((255, 255, 255), (246, 240, 228), (228, 240, 250), (230, 246, 232), (250, 232, 236), (236, 232, 248), (222, 226, 230), (252, 246, 214))

CLASSES = tuple(OBJECTS)
COLOURS = tuple(_SHADES)
TASK_NAMES = {  # GenEval's tasks, and what we call them to readers
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}
TASKS = tuple(TASK_NAMES)
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "seen", "held_out")
HELD_OUT_TASKS = ("two_object", "colors", "position", "color_attr")  # the tasks that compose a pair
# What training draws. "plain" is any emoji by its name; "mixed" combines tasks, as people do when they type: "a red car
# left of a dog", "three green apples". GenEval has no such prompts, so they are never judged.
TRAIN_MIX = {
    "plain": 0.08,
    "single_object": 0.11,
    "two_object": 0.14,
    "counting": 0.14,
    "colors": 0.11,
    "position": 0.15,
    "color_attr": 0.15,
    "mixed": 0.12,
}

_NUMBERS = ("zero", "one", "two", "three", "four")
_PREFIXES = ("", "", "a photo of ", "a picture of ")
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for: `count` objects of class `name`, in `colour` (None: its natural colours)."""

    name: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Prompt:
    """A caption and what it promises. In a position task, wanted[0] is `relation` wanted[1]."""

    text: str
    task: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Placed:
    """An object as drawn; `box` is (left, top, right, bottom) in pixels."""

    name: str
    colour: str | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """`image` is [3, size, size] in [-1, 1]."""

    image: torch.Tensor
    prompt: Prompt
    objects: tuple[Placed, ...]


# ------------------------------------------------------------------------------------------------- held-out pairs


def choose_held_out(seed: int = 0) -> dict[str, list]:
    """Pick the pairs that training never sees: 24 object-colour pairs (three a colour, at most one a class) and 48
    object-object pairs (three a class). The choice is stored in data/emoji/held_out.json; a test compares both."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(CLASSES)[: 3 * len(COLOURS)]
    object_colour = [[str(name), COLOURS[i % len(COLOURS)]] for i, name in enumerate(classes)]
    while True:  # a random 3-regular graph: pair up three copies of each class until no pair repeats
        ends = rng.permutation(np.repeat(np.arange(len(CLASSES)), 3)).reshape(-1, 2)
        pairs = {tuple(sorted(p)) for p in ends.tolist() if p[0] != p[1]}
        if len(pairs) == len(ends):
            break
    return {"object_colour": sorted(object_colour), "object_object": [[CLASSES[a], CLASSES[b]] for a, b in sorted(pairs)]}


@lru_cache(maxsize=1)
def held_out_pairs() -> tuple[frozenset, frozenset]:
    """(object-colour pairs as (name, colour), object-object pairs as frozensets of two names)."""
    path = data_dir() / "emoji" / "held_out.json"
    try:
        stored = json.loads(path.read_text("utf-8"))
        return frozenset(map(tuple, stored["object_colour"])), frozenset(map(frozenset, stored["object_object"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the held-out pairs in {path}: {reason(error)}") from None


def is_held_out(wanted: tuple[Wanted, ...]) -> bool:
    """True if the scene needs an object-colour or object-object pair that training never sees."""
    colours, objects = held_out_pairs()
    return any((w.name, w.colour) in colours for w in wanted) or any(
        frozenset((a.name, b.name)) in objects for a, b in combinations(wanted, 2)
    )


# ------------------------------------------------------------------------------------------------- prompts


def _pick(rng: np.random.Generator, options: tuple | list):
    return options[int(rng.integers(len(options)))]


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _phrase(rng: np.random.Generator, wanted: Wanted) -> str:
    """One object in words: "a red car", "one red car", "a car that is red"."""
    named = f"{wanted.colour} {wanted.name}" if wanted.colour else wanted.name
    forms = [_with_article(named), f"one {named}"]
    if wanted.colour:
        forms += [forms[0], f"{_with_article(wanted.name)} that is {wanted.colour}"]
    return _pick(rng, forms)


def _draw_wanted(rng: np.random.Generator, task: str) -> tuple[Wanted, ...]:
    if task == "counting":
        return (Wanted(_pick(rng, CLASSES), None, int(rng.integers(1, 5))),)
    if task == "mixed" and rng.random() < 0.4:
        return (Wanted(_pick(rng, CLASSES), _pick(rng, COLOURS), int(rng.integers(2, 5))),)
    names = rng.choice(CLASSES, size=1 if task in ("single_object", "colors") else 2, replace=False)
    if task == "colors":
        return (Wanted(str(names[0]), _pick(rng, COLOURS)),)
    if task == "color_attr":
        colours = rng.choice(COLOURS, size=2, replace=False)
        return tuple(Wanted(str(n), str(c)) for n, c in zip(names, colours))
    if task == "mixed":
        colours = _pick(rng, ((True, False), (False, True), (True, True)))
        return tuple(Wanted(str(n), _pick(rng, COLOURS) if coloured else None) for n, coloured in zip(names, colours))
    return tuple(Wanted(str(n)) for n in names)


def _draw_prompt(rng: np.random.Generator, task: str, held_out: bool) -> Prompt:
    if task == "plain":
        name = _pick(rng, plain_names())
        return Prompt(_pick(rng, _PREFIXES) + name, task, (Wanted(name),))
    wanted = _draw_wanted(rng, task)
    while is_held_out(wanted) != held_out:
        wanted = _draw_wanted(rng, task)
    prefix, relation = _pick(rng, _PREFIXES), None
    if task == "counting" or wanted[0].count > 1:
        (w,) = wanted
        number = _pick(rng, (_NUMBERS[w.count], _NUMBERS[w.count], str(w.count)))
        text = " ".join(filter(None, (number, w.colour, w.name if w.count == 1 else OBJECTS[w.name][1])))
    elif task in ("position", "mixed"):
        relation = _pick(rng, RELATIONS)
        text = f"{_phrase(rng, wanted[0])} {_pick(rng, _RELATION_WORDS[relation])} {_phrase(rng, wanted[1])}"
    else:
        text = _pick(rng, (" and ", " and ", " with ")).join(_phrase(rng, w) for w in wanted)
    return Prompt(prefix + text, task, wanted, relation, held_out)


def _generator(seed: int, index: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS.index(split), seed, index])


def draw_prompt(seed: int, index: int, split: str = "train", task: str | None = None) -> Prompt:
    """The prompt of scene (seed, index, split); `task` None draws one from the split's mix.

    Splits: `train` and `seen` hold only compositions that training may see (`seen` is for evaluation: other draws),
    `held_out` only those that it never sees, so its tasks are HELD_OUT_TASKS.
    """
    return _prompt(_generator(seed, index, split), split, task, TRAIN_MIX)


def _prompt(rng: np.random.Generator, split: str, task: str | None, mix: dict[str, float]) -> Prompt:
    if task is None:
        tasks = {"train": tuple(mix), "seen": TASKS, "held_out": HELD_OUT_TASKS}[split]
        weights = [mix[t] for t in tasks] if split == "train" else None
        task = _pick(rng, tasks) if weights is None else tasks[int(rng.choice(len(tasks), p=np.array(weights) / sum(weights)))]
    elif task not in (known := HELD_OUT_TASKS if split == "held_out" else tuple(TRAIN_MIX)):
        raise UserError(f"no {split} scenes of task {task!r}: choose one of {', '.join(known)}")
    return _draw_prompt(rng, task, held_out=split == "held_out")


# ------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=1)
def emoji_table() -> dict[str, dict]:
    """Emoji name -> row (image_webp, keywords, group, split) of the Fluent 3D table."""
    import pyarrow.parquet

    path = data_dir() / "emoji" / "fluent3d_128_rgba.parquet"
    try:
        return {row["name"]: row for row in pyarrow.parquet.read_table(path).to_pylist()}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the emoji sprites in {path}: {reason(error)}") from None


@lru_cache(maxsize=2)
def plain_names(split: str = "train") -> tuple[str, ...]:
    """Names of the emoji whose sprites may be drawn in training (`train`) or never are (`val`)."""
    return tuple(name for name, row in emoji_table().items() if row["split"] == split)


@lru_cache(maxsize=512)
def _sprite(name: str) -> Image.Image:
    """RGBA sprite cropped to what is visible."""
    emoji = OBJECTS[name][0] if name in OBJECTS else name
    image = Image.open(io.BytesIO(emoji_table()[emoji]["image_webp"])).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())


def recolour(rgb: np.ndarray, alpha: np.ndarray, colour: str) -> np.ndarray:
    """Map the lightness of rgb [H, W, 3] onto the dark-middle-light ramp of `colour`."""
    lightness = rgb @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(lightness[alpha > 0.5], (4, 96))
    t = np.clip((lightness - low) / max(high - low, 24.0), 0, 1)
    return np.stack([np.interp(t, (0, 0.5, 1), channel) for channel in zip(*_SHADES[colour])], axis=-1)


@lru_cache(maxsize=8192)
def premultiplied(name: str, colour: str | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sprite with its longer side `size` pixels: colour times alpha [h, w, 3] and alpha [h, w, 1], as uint8."""
    sprite = _sprite(name)
    scale = size / max(sprite.size)
    sprite = sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)
    pixels = np.asarray(sprite, dtype=np.float64)
    rgb, alpha = pixels[..., :3], pixels[..., 3:] / 255
    if colour:
        rgb = recolour(rgb, alpha[..., 0], colour)
    return (rgb * alpha + 0.5).astype(np.uint8), (alpha * 255 + 0.5).astype(np.uint8)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Plain or softly graded pastel, [size, size, 3] floats in 0..255."""
    first, second = (np.array(_pick(rng, _PASTELS), dtype=np.float32) for _ in range(2))
    if rng.random() < 0.5:
        return np.broadcast_to(first, (size, size, 3)).copy()
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    t = np.clip(0.5 + np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None], 0, 1)[..., None]
    return first * (1 - t) + second * t


# Centres of one to four objects, in units of the image; each is jittered afterwards. The picture is small, so every
# object has its own quarter.
_QUARTERS = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))


def _centres(rng: np.random.Generator, count: int, relation: str | None) -> list[tuple[float, float]]:
    if relation or (count == 2 and rng.random() < 0.7):
        relation = relation or _pick(rng, RELATIONS)
        across = rng.uniform(0.28, 0.72)
        near, far = (0.26, 0.74) if relation in ("left of", "above") else (0.74, 0.26)
        return [(near, across), (far, across)] if relation in ("left of", "right of") else [(across, near), (across, far)]
    order = rng.permutation(4)[:count]
    if count == 2:  # the remaining way to place two: a diagonal
        order = _pick(rng, ((0, 3), (3, 0), (1, 2), (2, 1)))
    return [_QUARTERS[i] for i in order]


def _place(rng: np.random.Generator, wanted: tuple[Wanted, ...], relation: str | None, size: int) -> list[tuple[Wanted, int, float, float]]:
    """Every object with its sprite size and centre in pixels."""
    objects = [w for w in wanted for _ in range(w.count)]
    if len(objects) == 1:
        side = rng.uniform(0.52, 0.78)
        room = (1 - side) / 2
        return [(objects[0], round(side * size), *((0.5 + rng.uniform(-room, room, 2)) * size))]
    low, high = (0.36, 0.46) if len(objects) == 2 else (0.32, 0.42)
    side = rng.uniform(low, high)
    placed = []
    for w, (x, y) in zip(objects, _centres(rng, len(objects), relation)):
        own = side * rng.uniform(0.92, 1.05)
        jitter = rng.uniform(-1, 1, 2) * (0.48 - own) / 2
        placed.append((w, round(own * size), (x + jitter[0]) * size, (y + jitter[1]) * size))
    return placed


def render(rng: np.random.Generator, prompt: Prompt, size: int = 64) -> Scene:
    """Draw what `prompt` promises on a `size` x `size` picture."""
    canvas = background(rng, size)
    objects = []
    for wanted, side, x, y in _place(rng, prompt.wanted, prompt.relation, size):
        colour, alpha = premultiplied(wanted.name, wanted.colour, side)
        height, width = alpha.shape[:2]
        left = int(np.clip(round(x - width / 2), 0, size - width))
        top = int(np.clip(round(y - height / 2), 0, size - height))
        window = canvas[top : top + height, left : left + width]
        window *= 1 - alpha.astype(np.float32) / 255
        window += colour
        objects.append(Placed(wanted.name, wanted.colour, (left, top, left + width, top + height)))
    image = torch.from_numpy(np.clip(canvas, 0, 255).astype(np.float32)).permute(2, 0, 1).contiguous()
    return Scene(image / 127.5 - 1, prompt, tuple(objects))


def draw_scene(seed: int, index: int, split: str = "train", task: str | None = None, size: int = 64, mix: dict[str, float] = TRAIN_MIX) -> Scene:
    """Scene number `index` of the endless data set (seed, split): its caption is `draw_prompt`'s with the same arguments."""
    rng = _generator(seed, index, split)
    prompt = _prompt(rng, split, task, mix)
    return render(rng, prompt, size)


def draw_images(seed: int, indices: range, split: str = "train", size: int = 64, mix: dict[str, float] = TRAIN_MIX) -> torch.Tensor:
    """Images alone, [len(indices), 3, size, size] in [-1, 1]."""
    return torch.stack([draw_scene(seed, i, split, size=size, mix=mix).image for i in indices])
