"""Notebook 00: the checkers of its exercises."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..detector import Detection
from ..evaluate import judge, near_misses, true_detections
from ..scenes import COLOURS, Prompt, draw_scene
from ..text import fuse
from .verdict import Verdict, call, right, wrong


def check_numbers(answer: Callable[[int], tuple[int, int]]) -> Verdict:
    """00, exercise 1: answer(image_size) counts the numbers in a square picture and in its latent (f = 8, 16 channels)."""
    for size in (64, 256, 1024):
        value, failed = call(answer, size)
        if failed is not None:
            return failed
        if not isinstance(value, tuple) or len(value) != 2 or ... in value:
            return wrong("return two numbers: those in the picture, then those in the latent.")
        picture, latent = value
        if picture != 3 * size**2:
            hint = " Every pixel has three colours." if picture == size**2 else " Height times width times colours."
            return wrong(f"a picture of {size} x {size} pixels does not hold {picture} numbers.{hint}")
        if latent != 16 * (size // 8) ** 2:
            hints = {
                (size // 8) ** 2: " Each position of the latent has sixteen channels.",
                16 * size**2: " The latent has fewer positions than the picture has pixels.",
                16 * size**2 // 8: " The factor 8 holds for the height and for the width.",
                3 * (size // 8) ** 2: " The latent's channels are not the three colours: look at the shape printed above.",
            }
            return wrong(f"the latent of a picture of {size} pixels does not hold {latent} numbers.{hints.get(latent, '')}")
    return right("a latent is twelve times smaller than its picture, at every size. The denoiser never sees a pixel.")


def check_fusion(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """00, exercise 2: answer(clip_l [B, T, dl], clip_g [B, T, dg], lm [B, S, D]) is the fused context [B, T + S, D]."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, lm_tokens, narrow, wide, width in ((2, 4, 6, 3, 5, 12), (1, 5, 5, 4, 4, 8), (3, 7, 2, 6, 2, 11)):
        clip_l = torch.randn(batch, tokens, narrow, generator=generator)
        clip_g = torch.randn(batch, tokens, wide, generator=generator)
        lm = torch.randn(batch, lm_tokens, width, generator=generator)
        value, failed = call(answer, clip_l.clone(), clip_g.clone(), lm.clone())
        if failed is not None:
            return failed
        expected = fuse(clip_l, clip_g, lm)
        if not isinstance(value, Tensor) or value.shape != expected.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return wrong(f"from {list(clip_l.shape)}, {list(clip_g.shape)} and {list(lm.shape)} comes {list(expected.shape)}, not {got}.")
        if not torch.equal(value, expected):
            return wrong(_fusion_hint(value, clip_l, clip_g, lm))
    return right("the CLIPs share their tokens, the language model brings its own, and zeros fill the rest.")


def _fusion_hint(value: Tensor, clip_l: Tensor, clip_g: Tensor, lm: Tensor) -> str:
    """What is wrong with a context of the right shape."""
    tokens, narrow, wide = clip_l.shape[1], clip_l.shape[2], clip_g.shape[2]
    if torch.equal(value[:, : lm.shape[1]], lm):
        return "the shape is right, but the language model's tokens come after the CLIPs'."
    if not torch.equal(value[:, tokens:], lm):
        return "the language model's part must arrive unchanged, below the CLIPs' tokens."
    clip = value[:, :tokens]
    if torch.equal(clip[..., :wide], clip_g):
        return "the shape is right, but CLIP-L comes before CLIP-G."
    if torch.equal(clip[..., -wide:], clip_g) and clip.shape[2] > narrow + wide:
        return "the zeros come last, after the channels of both CLIPs."
    if torch.equal(clip[..., : narrow + wide], torch.cat([clip_l, clip_g], dim=2)):
        return "the CLIPs' channels are right; what fills the rest of the width must be zeros."
    return "the language model's part is right, the CLIPs' part is not: CLIP-L's channels, then CLIP-G's, then zeros."


def check_judge(answer: Callable[[Prompt, list[Detection]], bool]) -> Verdict:
    """00, exercise 3: answer(prompt, detections) judges a picture by GenEval's rules, in all tasks but position."""
    for task in ("single_object", "two_object", "counting", "colors", "color_attr"):
        for index in range(8):
            scene = draw_scene(11, index, "seen", task)
            for label, prompt, detections in _judged_cases(scene.prompt, true_detections(scene), near_misses(scene)[:: 1 + index]):
                value, failed = call(answer, prompt, list(detections))
                if failed is not None:
                    return failed
                if bool(value) != judge(prompt, detections):
                    asked = " and ".join(" ".join(filter(None, (str(w.count), w.colour, w.name))) for w in prompt.wanted)
                    seen = ", ".join(" ".join(filter(None, (d.colour, d.name, f"({d.score:.1f})"))) for d in detections) or "nothing"
                    return wrong(f"task {task}, asked for {asked}, found {seen}: you say {bool(value)}, the rules say {not value}. {label}")
    return right("your judge agrees with the library's on every case. Now you know what a SceneEval score means.")


def _judged_cases(prompt: Prompt, truth: Sequence[Detection], wrong: Sequence[Prompt]) -> Iterator[tuple[str, Prompt, list[Detection]]]:
    """(hint, prompt, detections) around one scene: its truth, and what a careless judge stumbles over."""
    truth = list(truth)
    yield "Everything asked for is there.", prompt, truth
    yield "An empty picture shows nothing that was asked for.", prompt, []
    yield "Below 0.3 nothing counts as found.", prompt, [replace(d, score=0.2) for d in truth]
    yield "From 0.3 on an object is found; counting asks for more than 0.5.", prompt, [replace(d, score=0.4) for d in truth]
    for other in wrong:
        yield "Something else was asked for.", other, truth
    first = truth[0]
    colour = next(c for c in COLOURS if c not in {first.colour, *(w.colour for w in prompt.wanted)})
    more = replace(first, colour=colour, score=0.6)
    yield "One object more does harm in counting alone, and of each class the best-scored objects are asked for their colour.", prompt, [more, *truth]
    yield "A faint object more (score 0.4) does no harm, in counting neither.", prompt, [replace(more, score=0.4), *truth]
    if prompt.wanted[0].colour:
        doubted = [replace(first, score=0.7), *truth[1:], replace(more, score=0.9)]
        yield "The best-scored object of the class has another colour: it is the one that counts.", prompt, doubted
