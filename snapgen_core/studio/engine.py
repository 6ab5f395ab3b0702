"""Carries out the studio's tasks, step by step: a generator of events, which whoever listens may end at any step."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn

from .. import flow
from ..devices import best_device
from ..errors import UserError
from ..figures import image_grid, to_png
from ..latents import decode, load_decoder
from ..maps import WordReader
from ..paths import checkpoint_dir
from ..pipeline import SnapGenPipeline, load, load_unet, to_pil
from ..scales import PICTURE_STAGES, SAMPLING
from .order import COMPARED_STEPS, Event, Order, Task

SHOWN = 256  # pixels to which small pictures are enlarged in grids and animations
FRAME_MS = 120


@cache
def engine_of(scale: str) -> "Engine":
    """This process's one engine of a scale."""
    return Engine(scale)


class Engine:
    """The models of a scale, loaded when first asked for and kept.

    Raises:
        UserError: the scale has no student that draws, or no tiny decoder for previews.
    """

    def __init__(self, scale: str = "tiny"):
        self.scale = scale
        self.stages = [stage for stage in PICTURE_STAGES if (checkpoint_dir(scale) / stage / "config.json").is_file()]
        if not self.stages:
            raise UserError(f"there is no student at scale {scale}: train one with `snapgen train base --scale {scale} --ship`")
        self.preview = load_decoder(checkpoint_dir(scale) / "decoder").to(best_device())
        self._pipes = {self.stages[0]: load(scale, self.stages[0]).to(best_device())}

    def at(self, order: Order) -> SnapGenPipeline:
        """The pipeline of the order's stage; all of them share what is not the student's. Raises UserError."""
        if order.stage not in self.stages:
            raise UserError(f"Stage {order.stage} has no weights at scale {self.scale} yet: choose one of {', '.join(self.stages)}.")
        if order.stage not in self._pipes:
            first = self._pipes[self.stages[0]]
            unet = load_unet(checkpoint_dir(self.scale) / order.stage).to(first.device).eval()
            sizes = {name: first.config[name] for name in ("clip_tokens", "lm_tokens", "image_size")}
            steps, guidance = SAMPLING[order.stage]
            self._pipes[order.stage] = SnapGenPipeline(**first.components | {"unet": unet}, **sizes, steps=steps, guidance=guidance)
        return self._pipes[order.stage]

    def decoder(self, order: Order) -> nn.Module:
        return self.preview if order.decoder == "tiny" else self.at(order).vae

    def run(self, task: Task) -> Iterator[Event]:
        """Events of a task, as they happen; the last one is "done". Raises UserError."""
        task = task.checked()
        yield from {"draw": self.draw, "stages": self.stages_side_by_side, "steps": self.steps_side_by_side, "word": self.word, "walk": self.walk}[task.kind](task)
        yield Event("done", {})

    @torch.no_grad()
    def draw(self, task: Task) -> Iterator[Event]:
        order = task.order
        if unread := self.at(order).text.truncated(order.prompt, order.encoders):
            yield Event("note", {"text": f"The prompt is longer than the text encoders read. Its end is cut: “{unread}”."})
        for index in range(order.count):
            began = time.perf_counter()
            picture = yield from self._picture(replace(order, seed=order.seed + index), index, order.count)
            facts = order.facts(index) | {"scale": self.scale}
            yield Event("picture", facts | {"index": index, "of": order.count, "seconds": time.perf_counter() - began}, to_png(to_pil(picture)[0], facts))

    def _picture(self, order: Order, index: int, of: int, after_step: Callable[[], None] = lambda: None) -> Iterator[Event]:
        """Draws one picture, [1, 3, H, W] in [-1, 1], with a preview of the predicted clean latent after each step but the last."""
        pipe = self.at(order)
        context = pipe.text.encode([order.prompt], order.encoders)
        noise = pipe.noise(1, [torch.Generator().manual_seed(order.seed)])
        for step, x, x0 in flow.trajectory(pipe.velocity(context, order.guidance), noise, pipe.sigmas(order.steps)):
            after_step()
            if step + 1 < order.steps:
                yield Event("preview", {"index": index, "of": of, "step": step + 1, "steps": order.steps}, to_jpeg(to_pil(decode(self.preview, calm(x0)))[0]))
        return decode(self.decoder(order), x)

    def stages_side_by_side(self, task: Task) -> Iterator[Event]:
        """One seed, drawn by every stage in its own way."""
        orders = []
        for stage in self.stages:
            steps, guidance = SAMPLING[stage]
            orders.append((f"{stage}, {steps} steps", replace(task.order, stage=stage, steps=steps, guidance=guidance)))
        yield from self._side_by_side(orders, task)

    def steps_side_by_side(self, task: Task) -> Iterator[Event]:
        """One seed, drawn in fewer and in more steps."""
        yield from self._side_by_side([(f"{steps} step{'s' * (steps > 1)}", replace(task.order, steps=steps)) for steps in COMPARED_STEPS], task)

    @torch.no_grad()
    def _side_by_side(self, orders: list[tuple[str, Order]], task: Task) -> Iterator[Event]:
        began, pictures = time.perf_counter(), []
        for index, (_, order) in enumerate(orders):
            pictures.append((yield from self._picture(order, index, len(orders))))
        names = [name for name, _ in orders]
        grid = image_grid(torch.cat(pictures), names, columns=len(orders), side=max(160, SHOWN // 2))
        alt = f"{len(orders)} pictures of “{task.order.prompt}” from seed {task.order.seed}: {', '.join(names)}."
        yield Event("result", {"alt": alt, "seconds": time.perf_counter() - began}, to_png(grid))

    @torch.no_grad()
    def word(self, task: Task) -> Iterator[Event]:
        """Where in the picture the student reads a word: its share of the cross-attention, in warm colours over the picture."""
        order, began = task.order, time.perf_counter()
        with WordReader(self.at(order), order.prompt, order.encoders) as reader:
            picture = (yield from self._picture(order, 0, 1, reader.add_up))[0]
        maps = reader.maps()
        if task.word not in maps:
            raise UserError(f"{task.word!r} is not in the prompt: choose one of {', '.join(maps)}.")
        if not maps[task.word].any():
            raise UserError(f"The text encoders do not read as far as {task.word!r}.")
        heat = enlarge(heat_image(maps[task.word]))
        plain = enlarge(to_pil(picture[None])[0])
        grid = image_grid([plain, Image.blend(plain, heat, 0.55)], [order.prompt, task.word], columns=2, side=SHOWN)
        alt = f"Left “{order.prompt}”, right the same picture; the brighter and warmer a place, the more the student reads “{task.word}” there."
        yield Event("result", {"alt": alt, "seconds": time.perf_counter() - began}, to_png(grid))

    @torch.no_grad()
    def walk(self, task: Task) -> Iterator[Event]:
        """From one prompt and seed to another: contexts on the straight line, noise on the sphere, there and back."""
        order, began = task.order, time.perf_counter()
        pipe = self.at(order)
        ends = pipe.text.encode([order.prompt, task.to_prompt], order.encoders)
        noises = pipe.noise(2, [torch.Generator().manual_seed(seed) for seed in (order.seed, task.to_seed)])
        frames = []
        for index in range(task.frames):
            part = index / (task.frames - 1)
            context, noise = torch.lerp(*ends, part)[None], on_sphere(*noises, part)[None]
            x = flow.sample(pipe.velocity(context, order.guidance), noise, pipe.sigmas(order.steps))
            frames.append(to_pil(decode(self.decoder(order), x))[0])
            yield Event("preview", {"index": index, "of": task.frames, "step": index + 1, "steps": task.frames}, to_jpeg(frames[-1]))
        alt = f"An animation from “{order.prompt}”, seed {order.seed}, to “{task.to_prompt}”, seed {task.to_seed}, and back."
        yield Event("result", {"alt": alt, "seconds": time.perf_counter() - began}, to_gif([enlarge(frame) for frame in frames]))


def on_sphere(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Between noises a and b, `part` of the way: on the arc, where noise keeps its length (a straight line would cut it)."""
    angle = torch.arccos(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, part)
    return (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)


def heat_image(share: Tensor) -> Image.Image:
    """A map [h, w] as a picture from black over red and yellow to white, its own largest value the brightest."""
    level = (share - share.min()) / (share.max() - share.min()).clamp(min=1e-12)
    warm = torch.stack([(3 * level - start).clamp(0, 1) for start in range(3)])  # red comes first, then green, then blue
    return to_pil(2 * warm[None] - 1)[0]


def enlarge(image: Image.Image, side: int = SHOWN) -> Image.Image:
    """Small pictures `side` pixels wide; others as they are."""
    return image if image.width >= side else image.resize((side, side), Image.Resampling.BICUBIC)


def calm(x0: Tensor) -> Tensor:
    """A guess at the clean latent, in the range that decoders know: with guidance, early guesses go far beyond it."""
    return x0 / x0.std().clamp(min=1)


def to_jpeg(image: Image.Image) -> bytes:
    """A preview, small rather than exact."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def to_gif(frames: list[Image.Image]) -> bytes:
    """There and back, three times: what moves for ever is hard on those who read beside it."""
    buffer, loop = io.BytesIO(), frames + frames[-2:0:-1]
    loop[0].save(buffer, "GIF", save_all=True, append_images=loop[1:], duration=FRAME_MS, loop=2)
    return buffer.getvalue()
