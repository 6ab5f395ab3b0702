"""The detector: decoding, suppression, loss, hard scenes, round trip."""

import json

import numpy as np
import pytest
import torch

from snapgen_core.detector import (
    CELLS,
    MAX_BOXES,
    Detection,
    Detector,
    blur_matrix,
    decode,
    detection_loss,
    focal_loss,
    gaussian_blur,
    heat_targets,
    overlap,
    seen_colour,
    suppress,
)
from snapgen_core.errors import UserError
from snapgen_core.evaluate import load_detector
from snapgen_core.scenes import CLASSES, COLOURS, plain_names
from snapgen_core.stages.detector import DetectorStage
from snapgen_core.stages.hard_scenes import (
    COUNTS,
    Example,
    Label,
    distractors,
    draw_example,
    draw_free_scene,
    to_targets,
)

SMALL = dict(widths=(8, 16, 16), deep_blocks=1)


def empty_maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heat, box, colour = (torch.zeros(1, n, CELLS, CELLS) for n in (len(CLASSES), 4, len(COLOURS) + 1))
    return heat, box, colour


def test_size_and_shapes():
    detector = Detector()
    assert 0.5e6 <= sum(p.numel() for p in detector.parameters()) <= 1.1e6
    heat, box, colour = detector(torch.zeros(2, 3, 64, 64))
    assert heat.shape == (2, 32, 16, 16) and box.shape == (2, 4, 16, 16) and colour.shape == (2, 9, 16, 16)
    for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match="64, 64"):
            detector(wrong)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        detector.detect(torch.zeros(1, 64, 64))


def test_seen_colour():
    assert seen_colour("star", None) == "yellow" and seen_colour("star", "blue") == "blue"
    assert seen_colour("dog", None) is None


def test_decode_finds_peaks_only():
    heat, box, colour = empty_maps()
    heat[0, 3, 4, 5], heat[0, 3, 4, 6] = 0.9, 0.6  # a neighbour is no second object
    heat[0, 7, 12, 10] = 0.29  # too faint
    heat[0, 8, 12, 2] = 0.3  # "above" the threshold excludes it
    box[0, :, 4, 5] = torch.tensor([0.5, 0.25, 6.0, 4.0])
    colour[0, 2, 4, 5] = 3.0
    (found,) = decode(heat, box, colour, 0.3)
    assert found == [Detection(CLASSES[3], COLOURS[2], (10.0, 9.0, 34.0, 25.0), pytest.approx(0.9))]


def test_decode_natural_colour_and_edges():
    heat, box, colour = empty_maps()
    heat[0, 0, 0, 0] = 0.8
    box[0, :, 0, 0] = torch.tensor([0.5, 0.5, 8.0, -3.0])  # leaves the picture; a height below zero is mended
    colour[0, len(COLOURS), 0, 0] = 1.0
    (found,) = decode(heat, box, colour, 0.3)
    assert found[0].colour is None
    x0, y0, x1, y1 = found[0].box
    assert x0 == 0 and x1 == 18 and 0 <= y0 < y1 <= 64


def test_overlap():
    assert overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 4, 4), (4, 0, 8, 4)) == 0
    assert overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1


def test_suppress_keeps_the_best_of_one_object():
    dog = Detection("dog", None, (10, 10, 30, 30), 0.8)
    rabbit = Detection("rabbit", None, (11, 10, 31, 30), 0.7)  # the same thing under another name
    shifted = Detection("dog", None, (12, 12, 32, 32), 0.6)  # ... and twice under its own
    beside = Detection("dog", None, (22, 10, 42, 30), 0.5)  # overlaps, but is another object
    assert suppress([rabbit, shifted, beside, dog]) == [dog, beside]


def test_suppress_keeps_sixteen_of_a_class():
    row = [Detection("key", None, (2.0 * i, 0.0, 2.0 * i + 2, 2.0), 1 - i / 100) for i in range(20)]
    assert suppress(row) == row[:MAX_BOXES]
    other = Detection("dog", None, (0.0, 10.0, 5.0, 15.0), 0.1)
    assert suppress([*row, other])[-1] == other


def test_other_sizes_are_reduced():
    torch.manual_seed(0)
    detector = Detector(**SMALL).eval()
    with torch.no_grad():
        detector.heat[-1].bias.fill_(-0.5)
    small = torch.rand(2, 3, 64, 64) * 2 - 1
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert len(detector.detect(small, 0.3)) == 2
    assert all(0 <= d.box[0] < d.box[2] <= 64 for found in detector.detect(large, 0.3) for d in found)


def test_blur_keeps_brightness():
    assert torch.allclose(blur_matrix(9, 1.3).sum(1), torch.ones(9))
    image = torch.rand(3, 16, 16)
    assert torch.allclose(gaussian_blur(image, 0.0), image, atol=1e-6)
    spot = torch.zeros(1, 33, 33)
    spot[0, 16, 16] = 1
    blurred = gaussian_blur(spot, 2.0)
    position = torch.arange(33.0) - 16
    assert (blurred.sum((0, 1)) * position**2).sum() == pytest.approx(4.0, rel=0.02)


def test_heat_targets():
    objects = torch.tensor([[0, 5, 0, 4.5, 8.2, 6, 6], [1, 5, 0, 15.99, 16.0, 12, 3]])
    heat = heat_targets(objects, 2)
    assert heat[0, 5, 8, 4] == 1 and heat[1, 5, 15, 15] == 1
    assert (heat == 1).sum() == 2 and heat.sum((2, 3)).count_nonzero() == 2
    assert 0 < heat[0, 5, 8, 5] == heat[0, 5, 7, 4] < 1


def test_focal_loss_values():
    logits, target, weight = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1, 1, 2)
    by_hand = -(0.25 * np.log(0.5) + 0.25 * np.log(0.5))
    assert focal_loss(logits, target, weight).item() == pytest.approx(by_hand)
    weight[..., 1] = 0  # an uncertain cell is left out
    assert focal_loss(logits, target, weight).item() == pytest.approx(by_hand / 2)


def test_loss_of_nothing_is_finite():
    outputs = Detector(**SMALL)(torch.zeros(1, 3, 64, 64))
    loss, _ = detection_loss(outputs, torch.zeros(0, 7), torch.ones(1, 32, 16, 16))
    assert torch.isfinite(loss)
    loss.backward()


def test_targets_by_share():
    labels = (Label(0, 1, (8, 8, 24, 16), 0.9), Label(1, 8, (32, 32, 64, 64), 0.7), Label(2, 0, (0, 0, 16, 16), 0.3))
    objects, weight = to_targets([Example(torch.zeros(3, 64, 64), labels)])
    assert objects.tolist() == [[0, 0, 1, 4, 3, 4, 2]]
    assert (weight[0, 1, 8:, 8:] == 0).all() and (weight == 0).sum() == 64


def test_examples_are_pure_and_in_range():
    for index in (0, 17):
        a, b = draw_example(3, index), draw_example(3, index)
        assert torch.equal(a.image, b.image) and a.labels == b.labels
    assert not torch.equal(draw_example(3, 0).image, draw_example(4, 0).image)
    labels = []
    for i in range(150):
        example = draw_free_scene(np.random.default_rng(i))
        assert example.image.shape == (3, 64, 64) and example.image.abs().max() <= 1
        labels += example.labels
    for label in labels:
        left, top, right, bottom = label.box
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64 and 0 <= label.share <= 1.001
    shares = [label.share >= COUNTS for label in labels]
    assert 0.6 < np.mean(shares) < 0.95  # whole things prevail, broken ones are no rarity


def test_distractors_show_no_class():
    names = set(distractors())
    assert len(names) > 1000 and names <= set(plain_names())
    assert not names & {"dog", "dog face", "automobile", "police car", "green book", "pink heart", "tulip", "hot dog"}


def test_batches_are_pure_and_shared_out():
    stage = DetectorStage("tiny", 5)
    whole, again = stage.batch(2), stage.batch(2)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    halves = [stage.batch(2, rank, 2) for rank in range(2)]
    assert all(torch.equal(half["image"], whole["image"][rank::2]) for rank, half in enumerate(halves))
    assert sum(len(half["objects"]) for half in halves) == len(whole["objects"])


def test_loss_falls():
    stage = DetectorStage("tiny", 0)
    batch = stage.batch(0)
    keep = batch["objects"][:, 0] < 16
    batch = {"image": batch["image"][:16], "objects": batch["objects"][keep], "weight": batch["weight"][:16]}
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss, figures = stage.module(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and set(figures) == {"heat", "box", "colour"}


def test_round_trip(tmp_path):
    stage = DetectorStage("tiny", 0)
    (folder,) = stage.save(tmp_path)
    assert not list(folder.glob("*.bin")) and (folder / "diffusion_pytorch_model.safetensors").stat().st_size < 16e6
    loaded = load_detector(folder=folder)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    for a, b in zip(loaded(images), stage.module.detector(images)):
        assert torch.allclose(a, b, atol=0.02) and a.dtype == torch.float32
    assert not loaded.training and tuple(loaded.config.classes) == CLASSES


def test_broken_checkpoints_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no detector"):
        load_detector(folder=tmp_path)
    detector = Detector(**SMALL)
    detector.save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot load") as caught:
        load_detector(folder=tmp_path / "a")
    assert "\n" not in str(caught.value)
    Detector(**SMALL, classes=("dog",)).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="other classes"):
        load_detector(folder=tmp_path / "b")
    detector.save_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "widths": [16, 16, 16]}))  # of another model
    with pytest.raises(UserError, match="cannot load"):
        load_detector(folder=tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load"):
        load_detector(folder=tmp_path / "c")
