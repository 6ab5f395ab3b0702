"""Emoji scenes: purity, truth, captions and the held-out rule."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from snapgen_core import scenes
from snapgen_core.errors import UserError
from snapgen_core.paths import data_dir

SAMPLE = [scenes.draw_scene(5, i) for i in range(400)]


def test_size_of_the_world():
    assert len(scenes.CLASSES) >= 32 and len(scenes.COLOURS) >= 8 and len(scenes.TASKS) == 6
    assert len(scenes.emoji_table()) == 1606


def test_a_scene_is_a_pure_function_of_seed_index_and_split():
    a, b = scenes.draw_scene(3, 17), scenes.draw_scene(3, 17)
    assert torch.equal(a.image, b.image) and a.prompt == b.prompt and a.objects == b.objects
    scenes.draw_scene(3, 18)  # drawing others in between changes nothing
    assert torch.equal(scenes.draw_scene(3, 17).image, a.image)
    for other in (scenes.draw_scene(4, 17), scenes.draw_scene(3, 18), scenes.draw_scene(3, 17, "seen")):
        assert not torch.equal(other.image, a.image)


def test_prompt_without_drawing_is_the_scenes_prompt():
    for i in range(50):
        assert scenes.draw_prompt(2, i) == scenes.draw_scene(2, i).prompt


def test_image_range_and_boxes():
    for scene in SAMPLE:
        assert scene.image.shape == (3, 64, 64) and scene.image.abs().max() <= 1
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64


def test_objects_are_what_the_prompt_promises():
    for scene in SAMPLE:
        wanted = Counter()
        for w in scene.prompt.wanted:
            wanted[w.name, w.colour] += w.count
        assert Counter((o.name, o.colour) for o in scene.objects) == wanted
        if scene.prompt.task in scenes.TASKS:
            assert all(w.name in scene.prompt.text or w.count > 1 for w in scene.prompt.wanted)
            assert all(w.colour in scene.prompt.text for w in scene.prompt.wanted if w.colour)


def test_boxes_do_not_overlap_and_relations_hold():
    for scene in SAMPLE:
        for a, b in combinations(scene.objects, 2):
            width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
            height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
            assert width <= 1 or height <= 1, scene.prompt.text
        if scene.prompt.relation:
            first, second = (np.array([(o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2]) for o in scene.objects)
            dx, dy = first - second
            assert {"left of": dx < -8, "right of": dx > 8, "above": dy < -8, "below": dy > 8}[scene.prompt.relation]


def test_objects_show_in_their_boxes_and_nowhere_else():
    """The picture differs from its own background (a smooth gradient) only inside the boxes."""
    for scene in SAMPLE[:60]:
        outside = torch.ones(64, 64, dtype=torch.bool)
        for o in scene.objects:
            left, top, right, bottom = map(int, o.box)
            outside[top:bottom, left:right] = False
            assert scene.image[:, top:bottom, left:right].std() > 0.02
        steps = (scene.image[:, :, 1:] - scene.image[:, :, :-1]).abs().amax(0)
        quiet = outside[:, 1:] & outside[:, :-1]
        assert steps[quiet].max() < 0.05


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_recoloured_objects_have_the_colours_hue(colour):
    """Mean colour of every class in `colour` is nearer to that colour's middle shade than to any other colour's."""
    middles = {name: np.array(shades[1]) for name, shades in scenes._SHADES.items()}
    for name in scenes.CLASSES:
        rgb, alpha = scenes.premultiplied(name, colour, 48)
        mean = rgb.reshape(-1, 3).sum(0) / (alpha.sum() / 255)
        distance = {other: np.linalg.norm(mean - middle) for other, middle in middles.items()}
        assert min(distance, key=distance.get) == colour, (name, colour)


def test_wording_varies():
    texts = {scene.prompt.text for scene in (scenes.draw_scene(0, i, task="colors") for i in range(300))}
    assert any(t.startswith("a red ") for t in texts)
    assert any(t.startswith("one red ") for t in texts)
    assert any("that is red" in t for t in texts)
    assert any(" an orange " in f" {t}" for t in texts)


def test_mix_of_tasks_follows_the_weights():
    counts = Counter(scenes.draw_prompt(1, i).task for i in range(4000))
    total = sum(scenes.TRAIN_MIX.values())
    for task, weight in scenes.TRAIN_MIX.items():
        assert counts[task] / 4000 == pytest.approx(weight / total, abs=0.025)


def test_training_never_shows_a_held_out_pair():
    colours, objects = scenes.held_out_pairs()
    for i in range(3000):
        prompt = scenes.draw_prompt(0, i)
        assert not prompt.held_out
        assert not any((w.name, w.colour) in colours for w in prompt.wanted)
        assert frozenset(w.name for w in prompt.wanted) not in objects


def test_held_out_prompts_always_hold_a_held_out_pair_and_seen_never():
    for i in range(500):
        assert scenes.is_held_out(scenes.draw_prompt(0, i, "held_out").wanted)
        assert not scenes.is_held_out(scenes.draw_prompt(0, i, "seen").wanted)


def test_stored_held_out_pairs_are_the_chosen_ones_and_balanced():
    stored = json.loads((data_dir() / "emoji" / "held_out.json").read_text())
    assert stored == scenes.choose_held_out()
    assert set(Counter(colour for _, colour in stored["object_colour"]).values()) == {3}
    assert set(Counter(name for pair in stored["object_object"] for name in pair).values()) == {3}
    assert set(Counter(name for name, _ in stored["object_colour"]).values()) == {1}


def test_object_sprites_belong_to_the_training_split():
    assert all(scenes.emoji_table()[emoji]["split"] == "train" for emoji, _ in scenes.OBJECTS.values())
    assert not set(scenes.plain_names("train")) & set(scenes.plain_names("val"))


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match="unknown split 'test'"):
        scenes.draw_scene(0, 0, "test")
    with pytest.raises(UserError, match="no held_out scenes of task 'counting'"):
        scenes.draw_prompt(0, 0, "held_out", "counting")
