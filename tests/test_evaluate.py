"""SceneEval: GenEval's rules, intervals, and whether the judge can be trusted."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from snapgen_core.detector import Detection
from snapgen_core.evaluate import (
    COUNTING_THRESHOLD,
    Report,
    Score,
    bootstrap_interval,
    evaluate_stage,
    explain,
    judge,
    load_detector,
    near_misses,
    paired_difference,
    relative_position,
    scene_eval,
    scene_prompts,
    true_detections,
    validate_detector,
)
from snapgen_core.evaluate.sceneeval import judge_prompts, picture_seed, pipeline_generator, relay_generator, teacher_generator
from snapgen_core.evaluate.truth import another_caption, true_scenes
from snapgen_core.latents import decode
from snapgen_core.pipeline import load
from snapgen_core.scales import get_scale
from snapgen_core.scenes import HELD_OUT_TASKS, TASKS, Prompt, Wanted, draw_scene, is_held_out
from snapgen_core.teachers import guided_velocity, load_teacher


def prompt(task: str, *wanted: Wanted, relation: str | None = None) -> Prompt:
    return Prompt("some words", task, wanted, relation)


def at(name: str, x: float = 32, y: float = 32, colour: str | None = None, score: float = 0.9) -> Detection:
    return Detection(name, colour, (x - 10, y - 10, x + 10, y + 10), score)


# ------------------------------------------------------------------------------------------------- rules


def test_object_present():
    single = prompt("single_object", Wanted("dog"))
    assert judge(single, [at("dog")]) and judge(single, [at("dog", score=0.301)])
    assert judge(single, [at("dog"), at("dog", 10), at("cat", 50)])  # more is no harm
    assert not judge(single, [at("dog", score=0.3)])  # the threshold itself is not above the threshold
    assert not judge(single, []) and not judge(single, [at("rabbit")])
    both = prompt("two_object", Wanted("dog"), Wanted("car"))
    assert judge(both, [at("car"), at("dog", 10)])
    assert not judge(both, [at("car"), at("car", 10)]) and not judge(both, [at("dog")])
    assert "car" in explain(both, [at("dog")])


def test_counting_is_exact_and_stricter():
    three = prompt("counting", Wanted("key", None, 3))
    keys = [at("key", x) for x in (10, 30, 50)]
    assert judge(three, keys)
    assert not judge(three, keys[:2]) and not judge(three, [*keys, at("key", 60)])
    faint = at("key", 60, score=COUNTING_THRESHOLD)
    assert judge(three, [*keys, faint])  # a faint fourth is not counted
    assert not judge(three, [*keys[:2], faint])  # ... nor does a faint third help
    assert judge(three, [*keys, at("dog", 10, 60)])  # other things may be there
    assert judge(prompt("single_object", Wanted("key")), [faint])  # elsewhere the lower threshold holds


def test_colour_of_the_most_confident():
    red = prompt("colors", Wanted("car", "red"))
    assert judge(red, [at("car", colour="red")])
    assert not judge(red, [at("car", colour="pink")]) and not judge(red, [at("car")])
    blue = at("car", 10, colour="blue", score=0.95)
    assert not judge(red, [at("car", colour="red", score=0.9), blue])
    assert judge(red, [at("car", colour="red", score=0.96), blue])
    assert not judge(red, [at("house", colour="red")])


def test_each_object_has_its_own_colour():
    wanted = prompt("color_attr", Wanted("car", "red"), Wanted("hat", "blue"))
    assert judge(wanted, [at("hat", 10, colour="blue"), at("car", colour="red")])
    assert not judge(wanted, [at("hat", 10, colour="red"), at("car", colour="blue")])
    assert not judge(wanted, [at("hat", 10, colour="blue"), at("car", colour="green")])


def test_position_of_the_most_confident():
    left = prompt("position", Wanted("dog"), Wanted("car"), relation="left of")
    assert judge(left, [at("dog", 15), at("car", 50)])
    assert not judge(left, [at("dog", 50), at("car", 15)]) and not judge(left, [at("dog", 15)])
    assert not judge(left, [at("dog", 15), at("car", 50, score=0.8), at("car", 5, score=0.9)])
    assert judge(left, [at("dog", 15), at("car", 50, score=0.9), at("car", 5, score=0.8)])
    assert not judge(left, [at("dog", 32, 10), at("car", 32, 50)])
    assert "above" in explain(left, [at("dog", 32, 10), at("car", 32, 50)])


def test_position_margins():
    a = (0.0, 0.0, 10.0, 10.0)

    def moved(dx: float, dy: float = 0.0) -> tuple[float, float, float, float]:
        return (dx, dy, dx + 10, dy + 10)

    # Along an axis: 0.1 * (10 + 10) = 2 px are taken off, and half of the offset has to remain: 4 px is the border.
    assert relative_position(a, moved(4.01)) == {"left of"} and relative_position(a, moved(3.99)) == set()
    assert relative_position(moved(4.01), a) == {"right of"}
    assert relative_position(a, moved(0, 4.01)) == {"above"} and relative_position(moved(0, 4.01), a) == {"below"}
    assert relative_position(a, a) == set() and relative_position(a, moved(2, 2)) == set()
    assert relative_position(a, moved(20, 20)) == {"left of", "above"}  # a diagonal is both
    assert relative_position(a, moved(20, 8)) == {"left of"}


def position_by_hand(a, b) -> set[str]:
    """GenEval's rule without vectors."""
    dx = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2
    dy = (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    length = math.sqrt(dx * dx + dy * dy)
    rest_x = abs(dx) - 0.1 * ((a[2] - a[0]) + (b[2] - b[0]))
    rest_y = abs(dy) - 0.1 * ((a[3] - a[1]) + (b[3] - b[1]))
    names = set()
    if rest_x > 0.5 * length and rest_x >= 1e-3:
        names.add("left of" if dx < 0 else "right of")
    if rest_y > 0.5 * length and rest_y >= 1e-3:
        names.add("above" if dy < 0 else "below")
    return names


def test_position_against_brute_force():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        corners, sides = rng.uniform(0, 40, (2, 2)), rng.uniform(2, 24, (2, 2))
        a, b = (tuple(np.concatenate([c, c + s])) for c, s in zip(corners, sides))
        assert relative_position(a, b) == position_by_hand(a, b)
        seen |= {frozenset(relative_position(a, b))}
    assert len(seen) == 9  # nothing, four directions, four diagonals


def test_only_judged_tasks():
    with pytest.raises(ValueError, match="plain"):
        judge(prompt("plain", Wanted("dog")), [])
    with pytest.raises(ValueError, match="unicorn"):
        judge(prompt("single_object", Wanted("unicorn")), [])


# ------------------------------------------------------------------------------------------------- truth


def test_truth_is_right_and_near_misses_are_wrong():
    tasks = set()
    for split, task, scenes in true_scenes(20, seed=3):
        tasks.add((split, task))
        for i, scene in enumerate(scenes):
            truth = true_detections(scene)
            assert judge(scene.prompt, truth), (scene.prompt, explain(scene.prompt, truth))
            misses = near_misses(scene)
            assert misses and not any(judge(p, truth) for p in misses)
            other = another_caption(scenes, i)
            assert other.task == task and not judge(other, truth)
    assert len(tasks) == len(TASKS) + len(HELD_OUT_TASKS)


# ------------------------------------------------------------------------------------------------- intervals


def test_interval_of_a_binomial():
    right = [[i < 120] for i in range(200)]
    low, high = bootstrap_interval({"single_object": right})
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert low == pytest.approx(0.6 - half, abs=0.01) and high == pytest.approx(0.6 + half, abs=0.01)
    assert bootstrap_interval({"single_object": right}) == (low, high)


def test_interval_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval({"a": rng.random((60, 1)) < 0.7, "b": rng.random((30, 1)) < 0.4}, resamples=500)
        hits += low <= 0.55 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_interval_resamples_prompts_not_pictures():
    apart = {"a": [[i % 2 == 0] for i in range(400)]}
    together = {"a": [[i % 2 == 0] * 4 for i in range(100)]}  # four pictures that always agree tell what one does
    widths = [high - low for low, high in map(bootstrap_interval, (apart, together))]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.15)


def test_overall_is_the_mean_of_tasks():
    seen = {task: [[True]] * 10 for task in TASKS}
    seen["counting"] = [[False]] * 30
    held_out = {task: [[task == "colors", True]] * 5 for task in HELD_OUT_TASKS}
    report = Report.of(seen, held_out)
    assert report.overall.score == pytest.approx(5 / 6) and report.overall.n == 80
    assert report.seen.score == 1 and report.seen.n == 40  # the same four tasks as held_out: counting has no part
    assert report.held_out.score == pytest.approx(0.625) and report.held_out.n == 40
    assert report.tasks["counting"].score == 0 and set(report.held_out_tasks) == set(HELD_OUT_TASKS)
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["overall"]["score"] == report.overall.score and stored["tasks"]["colors"]["n"] == 10
    assert report.figures()["held_out_pairs"] == report.held_out.score
    for name in (*TASKS, "overall", "held-out pairs"):
        assert name in report.table()
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval({"a": []})


# ------------------------------------------------------------------------------------------------- SceneEval


def test_prompts():
    seen, held_out = scene_prompts(8, 4, "seen"), scene_prompts(8, 4, "held_out")
    assert [p.task for p in seen] == [t for t in TASKS for _ in range(8)] and seen == scene_prompts(8, 4, "seen")
    assert {p.task for p in held_out} == set(HELD_OUT_TASKS)
    assert not any(is_held_out(p.wanted) for p in seen) and all(is_held_out(p.wanted) for p in held_out)
    assert seen != scene_prompts(8, 5, "seen")
    firsts = {tuple(w.name for w in p.wanted) for p in seen if p.task in ("two_object", "position")}
    assert len(firsts) > 8  # tasks do not repeat each other's objects


def test_picture_seeds_differ():
    captions = {p.text for p in scene_prompts(20, 0)}
    assert len({picture_seed(s, c, n) for s in (0, 1) for n in range(3) for c in captions}) == 6 * len(captions)


class Oracle:
    """Generator and detector in one: the "picture" names a scene, and the detector knows all scenes."""

    def __init__(self, wrong_every: int = 0):
        self.shown, self.wrong_every, self.calls = [], wrong_every, []

    def generate(self, captions, seeds):
        self.calls.append((list(captions), list(seeds)))
        images = torch.zeros(len(captions), 3, 64, 64)
        for i, caption in enumerate(captions):
            images[i, 0, 0, 0] = len(self.shown)
            self.shown.append(caption)
        return images

    def detect(self, images, threshold):
        found = []
        for image in images:
            number = int(image[0, 0, 0])
            right = not self.wrong_every or number % self.wrong_every
            found.append(true_detections(SCENES[self.shown[number]]) if right else [])
        return found


SCENES: dict[str, object] = {}


def fill_scenes(per_task: int, seed: int) -> None:
    for split, tasks in (("seen", TASKS), ("held_out", HELD_OUT_TASKS)):
        for task in tasks:
            for i in range(per_task):
                scene = draw_scene(seed, i * len(TASKS) + TASKS.index(task), split, task)
                SCENES[scene.prompt.text] = scene


def test_scene_eval_with_a_perfect_generator():
    fill_scenes(6, 0)
    oracle = Oracle()
    report = scene_eval(oracle.generate, 6, images_per_prompt=2, detector=oracle, batch_size=7, progress=False)
    assert report.overall.score == 1 and report.held_out.score == 1
    assert report.overall.n == 72 and report.held_out.n == 24
    assert max(len(captions) for captions, _ in oracle.calls) == 7
    seeds = [seed for _, batch in oracle.calls for seed in batch]
    assert len(set(seeds)) == len(seeds)
    again = Oracle()
    scene_eval(again.generate, 6, images_per_prompt=2, detector=again, batch_size=32, progress=False)
    assert [s for _, batch in again.calls for s in batch] == seeds  # seeds do not depend on the batch size


def test_scene_eval_counts_failures_and_refuses_wrong_shapes():
    fill_scenes(6, 0)
    oracle = Oracle(wrong_every=2)
    report = scene_eval(oracle.generate, 6, detector=oracle, held_out_per_task=0, progress=False)
    assert report.overall.score == pytest.approx(0.5) and report.held_out is None
    with pytest.raises(ValueError, match=r"\[2, 3, H, W\]"):
        judge_prompts(lambda c, s: torch.zeros(len(c), 1, 64, 64), scene_prompts(1)[:2], oracle, progress=False)
    with pytest.raises(ValueError, match="at least one"):
        scene_eval(oracle.generate, 0, detector=oracle)


def test_evaluate_stage(monkeypatch):
    fill_scenes(4, 0)
    oracle = Oracle()

    def pipe(captions, num_inference_steps, guidance_scale, generator, output_type):
        assert (num_inference_steps, guidance_scale, output_type) == (4, 1.0, "pt")
        assert len({g.initial_seed() for g in generator}) == len(captions)  # every picture has its own generator
        return SimpleNamespace(images=oracle.generate(captions, []))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("snapgen_core.load", lambda scale, stage, folder, decoder: SimpleNamespace(to=lambda device: pipe))
    monkeypatch.setattr("snapgen_core.evaluate.sceneeval.load_detector", lambda: oracle)
    result = evaluate_stage("tiny", "base", images=4, seed=0, steps=4, guidance=1.0)
    assert json.loads(json.dumps(result)) == result
    assert result["overall"]["score"] == 1 and result["overall"]["n"] == 24 and result["held_out"]["n"] == 8
    assert result["settings"]["images_per_task"] == 4 and result["settings"]["steps"] == 4
    assert result["outcomes"] == {task: "1111" for task in TASKS}


def test_the_teacher_takes_over_between_two_levels():
    """Everywhere it draws its own pictures, nowhere the student's; between, each step by hand."""
    pipe, (teacher, text) = load("tiny", "base"), load_teacher("tiny")
    captions, seeds = ["a red car", "two dogs"], [3, 4]
    noise = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def drawn(low, high):
        return relay_generator(pipe, teacher, text, (low, high), steps=4, guidance=2.0)(captions, seeds)

    assert torch.allclose(drawn(0.0, 1.0), teacher_generator("tiny", teacher, text, 4, 2.0)(captions, seeds), atol=1e-5)
    assert torch.allclose(drawn(0.1, 0.2), pipeline_generator(pipe, 4, 2.0)(captions, seeds), atol=1e-5)
    fields = pipe.velocity(pipe.text.encode(captions), 2.0), guided_velocity(teacher, *text(["", "", *captions]), 2.0)
    x = noise
    with torch.no_grad():
        for here, there, who in ((1.0, 0.9, 0), (0.9, 0.75, 1), (0.75, 0.5, 1), (0.5, 0.0, 0)):
            x = x + (there - here) * fields[who](x, torch.tensor(here))
        assert torch.allclose(drawn(0.5, 0.9), decode(pipe.vae, x), atol=1e-4)


def test_evaluate_stage_takes_a_teacher(monkeypatch):
    """Same prompts, and the noise that a student's pipeline draws for the same picture."""
    fill_scenes(2, 0)
    oracle, noises = Oracle(), []
    config = get_scale("tiny")

    def sample(teacher, text, captions, noise, sigmas, guidance):
        assert (teacher.name, text.name, guidance, len(sigmas)) == ("teacher", "text", 2.0, 4)
        noises.append(noise)
        return oracle.generate(captions, [])

    class Part(SimpleNamespace):
        def to(self, device):
            return self

    teacher, text = Part(name="teacher", transformer=SimpleNamespace(device=torch.device("cpu"))), Part(name="text")
    room = "snapgen_core.evaluate.sceneeval."
    monkeypatch.setattr(room + "load_teacher", lambda scale, folder, few_steps: (teacher, text))
    monkeypatch.setattr(room + "sample", sample)
    monkeypatch.setattr(room + "decode", lambda painter, latents: latents)
    monkeypatch.setattr(room + "load_detector", lambda: oracle)
    result = evaluate_stage("tiny", "teacher", images=2, steps=3, guidance=2.0)
    assert result["overall"]["score"] == 1 and result["settings"]["stage"] == "teacher"
    caption = scene_prompts(2)[0].text
    expected = torch.randn(config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(picture_seed(0, caption, 0)))
    assert torch.equal(noises[0][0], expected)


def test_paired_difference_by_hand():
    better = {"colors": "1111", "position": "1100"}
    worse = {"colors": "1110", "position": "0100"}
    gap = paired_difference([better, better], [worse, better])
    assert gap.score == pytest.approx(((1 / 4 + 1 / 4) / 2 + 0) / 2) and gap.n == 16
    assert paired_difference([better], [better]) == Score(0.0, 0.0, 0.0, 8)
    with pytest.raises(ValueError, match="different pictures"):
        paired_difference([better], [{"colors": "1110", "position": "010"}])
    with pytest.raises(ValueError, match="different pictures"):
        paired_difference([better], [worse, worse])


def test_paired_difference_is_surer_than_two_intervals():
    """Where the same prompts are hard for both, an interval of their differences leaves out what they share."""
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    theirs = "".join("0" if h else "1" for h in hard)
    ours = "".join("1" if not h or r < 0.1 else "0" for h, r in zip(hard, rng.random(400)))
    gap = paired_difference([{"a": ours}], [{"a": theirs}])
    low, high = bootstrap_interval({"a": [[c == "1"] for c in theirs]})
    assert gap.low > 0 and gap.high - gap.low < 0.7 * (high - low)
    differences = np.array([int(a) - int(b) for a, b in zip(ours, theirs)])
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * differences.std() / 20, rel=0.1)  # the normal approximation


# ------------------------------------------------------------------------------------------------- shipped weights


def test_shipped_detector_can_be_trusted():
    detector = load_detector()
    sharp = validate_detector(detector, per_task=40, seed=1234)  # 400 scenes that neither training nor the card used
    assert sharp["right"] >= 0.98, sharp
    assert sharp["wrong_accepted"] <= 0.05 and sharp["near_miss_accepted"] <= 0.05, sharp
    nothing = detector.detect(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert sum(map(len, nothing)) == 0
