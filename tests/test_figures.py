"""Grids, tables and results as notebooks show them."""

import json

import pytest
import torch
from PIL import Image

from snapgen_core import figures
from snapgen_core.figures import Comparison, image_grid, measured

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")
PICTURES = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]


def places(sheet: Image.Image) -> list[tuple[int, int, int, int]]:
    """The box of each colour: (left, top, right, bottom)."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(sheet.height, sheet.width, 3)
    boxes = []
    for picture in PICTURES:
        rows, columns = (pixels == torch.tensor(picture.getpixel((0, 0)))).all(-1).nonzero().unbind(1)
        boxes.append((columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1))
    return boxes


@pytest.mark.parametrize(
    "captions, rows",
    [((), ()), ([f"picture {i} has a caption of many words that fills lines" for i in range(6)], ()), (("a", "b", "c"), ("above", "a name of many words")), ((), ("x", "y"))],
)
def test_pictures_stand_in_rows_whole_and_apart(captions, rows):
    boxes = places(image_grid(PICTURES, captions, columns=3, side=60, rows=rows))
    assert all((right - left, bottom - top) == (60, 60) for left, top, right, bottom in boxes)  # no text on any of them
    lefts, tops = [box[0] for box in boxes], [box[1] for box in boxes]
    assert lefts[:3] == lefts[3:] == sorted(lefts[:3]) and lefts[1] - lefts[0] > 60
    assert tops[0] == tops[2] and tops[3] == tops[5] >= tops[0] + 60


def test_a_tensor_is_drawn_as_its_pictures():
    tensor = torch.stack([torch.tensor(picture.getpixel((0, 0))) / 127.5 - 1 for picture in PICTURES])[:, :, None, None].expand(-1, -1, 8, 8)
    assert image_grid(tensor, columns=3, side=20).tobytes() == image_grid(PICTURES, columns=3, side=20).tobytes()


@pytest.mark.parametrize("captions, rows", [(("a",), ()), (("a",) * 6, ("one", "two")), ((), ("one",))])
def test_a_grid_never_drops_a_text(captions, rows):
    with pytest.raises(ValueError, match="6 pictures in 3 columns"):
        image_grid(PICTURES, captions, columns=3, rows=rows)


def test_comparison_shows_what_is_printed_and_rounds_what_is_measured():
    table = Comparison("tiny")
    table.add("a <b>", 27.92, 30.3004, "remark")
    table.add("  c", None, "0.40")
    lines = str(table).splitlines()
    assert lines[0].split() == ["published", "(paper", "scale)", "measured", "(tiny)", "remark"]
    assert lines[1].split() == ["a", "<b>", "27.92", "30.3", "remark"] and lines[2].split() == ["c", "–", "0.40"]
    assert "a &lt;b&gt;" in table._repr_html_()


def test_a_result_counts_only_at_its_own_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "results_dir", lambda: tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({"scale": "tiny", "scores": {"psnr": 30.0}}))
    assert measured("r", "tiny")["scores"] == {"psnr": 30.0}
    assert measured("r", "paper") == {} == measured("missing", "tiny")
