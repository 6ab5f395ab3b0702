"""Can the judge be trusted? Scenes whose truth is known, under their own captions and under wrong ones."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..detector import Detection, Detector, gaussian_blur, seen_colour
from ..scenes import CLASSES, COLOURS, HELD_OUT_TASKS, RELATIONS, TASKS, Prompt, Scene, Wanted, draw_scene
from . import rules

COUNTING_GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def true_detections(scene: Scene) -> list[Detection]:
    """What a perfect detector finds in `scene`."""
    return [Detection(o.name, seen_colour(o.name, o.colour), o.box, 1.0) for o in scene.objects]


def _others(options: tuple[str, ...], taken: set[str]) -> list[str]:
    return [option for option in options if option not in taken]


def near_misses(scene: Scene) -> list[Prompt]:
    """All captions that are wrong about `scene` in one thing: another class for one object, one more or less, another
    colour, colours exchanged, another relation. (Their text is the right one's; the judge does not read it.)"""
    prompt = scene.prompt
    wrong: list[tuple[tuple[Wanted, ...], str | None]] = []
    if prompt.task == "counting":
        (w,) = prompt.wanted
        wrong += [((replace(w, count=count),), None) for count in (w.count - 1, w.count + 1) if count > 0]
    elif prompt.task == "position":
        wrong += [(prompt.wanted, relation) for relation in _others(RELATIONS, {prompt.relation})]
    elif prompt.task in ("colors", "color_attr"):
        for i, w in enumerate(prompt.wanted):
            for colour in _others(COLOURS, {w.colour}):
                wrong.append((prompt.wanted[:i] + (replace(w, colour=colour),) + prompt.wanted[i + 1 :], None))
        if len(prompt.wanted) == 2:
            a, b = prompt.wanted
            wrong.append(((replace(a, colour=b.colour), replace(b, colour=a.colour)), None))
    else:
        names = {w.name for w in prompt.wanted}
        for i, w in enumerate(prompt.wanted):
            for name in _others(CLASSES, names):
                wrong.append((prompt.wanted[:i] + (replace(w, name=name),) + prompt.wanted[i + 1 :], None))
    prompts = [replace(prompt, wanted=wanted, relation=relation) for wanted, relation in wrong]
    truth = true_detections(scene)
    return [p for p in prompts if not rules.judge(p, truth)]


def another_caption(scenes: list[Scene], index: int) -> Prompt | None:
    """The next scene's prompt that is wrong about scene number `index`."""
    truth = true_detections(scenes[index])
    for other in scenes[index + 1 :] + scenes[:index]:
        if not rules.judge(other.prompt, truth):
            return other.prompt
    return None


def true_scenes(per_task: int, seed: int) -> Iterator[tuple[str, str, list[Scene]]]:
    """(split, task, scenes) for every judged task of the splits `seen` and `held_out`; training draws from neither at
    the same seeds."""
    for split, tasks in (("seen", TASKS), ("held_out", HELD_OUT_TASKS)):
        for task in tasks:
            yield split, task, [draw_scene(seed, i, split, task) for i in range(per_task)]


def _detect(detector: Detector, scenes: list[Scene], blur: float, threshold: float) -> list[list[Detection]]:
    found = []
    for first in range(0, len(scenes), 64):
        images = torch.stack([scene.image for scene in scenes[first : first + 64]])
        found += detector.detect(gaussian_blur(images, blur) if blur else images, threshold)
    return found


def _counted_right(scenes: list[Scene], found: list[list[Detection]], threshold: float) -> float:
    """Share of counting scenes in which as many detections score above `threshold` as there are objects."""
    right = 0
    for scene, detections in zip(scenes, found):
        (wanted,) = scene.prompt.wanted
        right += wanted.count == sum(d.name == wanted.name and d.score > threshold for d in detections)
    return right / len(scenes)


def validate_detector(detector: Detector, per_task: int = 100, seed: int = 0, blur: float = 0.0) -> dict[str, float]:
    """Judge true scenes by their detections, `per_task` of each task and split, blurred with `blur` pixels.

    Returns shares in 0..1: `right` (accepted under their own captions: the mean over tasks and splits, and for each
    task), `wrong_accepted` (under another scene's caption of the same task), `near_miss_accepted` (under a caption
    wrong in one thing), and `counting_right_at_T` for thresholds T on counting scenes.
    """
    right: dict[str, list[float]] = {task: [] for task in TASKS}
    wrong, near = [], []
    figures: dict[str, float] = {}
    rng = np.random.default_rng([13, seed])
    for split, task, scenes in true_scenes(per_task, seed):
        found = _detect(detector, scenes, blur, min(COUNTING_GRID))
        for i, (scene, detections) in enumerate(zip(scenes, found)):
            right[task].append(rules.judge(scene.prompt, detections))
            other, misses = another_caption(scenes, i), near_misses(scene)
            wrong += [rules.judge(other, detections)] if other else []
            near += [rules.judge(misses[rng.integers(len(misses))], detections)] if misses else []
        if task == "counting":
            figures = {f"counting_right_at_{t}": _counted_right(scenes, found, t) for t in COUNTING_GRID}
    shares = {f"right_{task}": float(np.mean(values)) for task, values in right.items()}
    accepted = {"wrong_accepted": float(np.mean(wrong)), "near_miss_accepted": float(np.mean(near))}
    return {"right": float(np.mean(list(shares.values()))), **shares, **accepted, **figures}
