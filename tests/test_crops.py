"""Random crops of a user's pictures, as files and in shards."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from snapgen_core.crops import PictureCrops, crop
from snapgen_core.errors import UserError


def picture(width=40, height=30, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_crops_are_a_pure_function_of_seed_and_index(tmp_path):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    a, b = PictureCrops(tmp_path, 16, seed=1), PictureCrops(tmp_path, 16, seed=1)
    assert all(torch.equal(a.draw(i), b.draw(i)) for i in (5, 0, 5))
    assert not torch.equal(a.draw(0), a.draw(1)) and not torch.equal(a.draw(0), PictureCrops(tmp_path, 16, seed=2).draw(0))
    assert a.draw(0).shape == (3, 16, 16) and a.draw(0).min() >= -1 and a.draw(0).max() <= 1


@pytest.mark.filterwarnings("ignore:left out")
def test_many_at_once_are_the_same_as_one_by_one(tmp_path):
    for i in range(4):
        picture(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    shard(tmp_path / "more.tar", {f"{i}.png": png(picture(seed=i)) for i in range(10, 14)})
    one_by_one = PictureCrops(tmp_path, 16)
    expected = torch.stack([one_by_one.draw(i) for i in range(3, 60)])
    together = PictureCrops(tmp_path, 16)
    assert torch.equal(together(range(3, 60)), expected)
    assert together.skipped == one_by_one.skipped == {"2.png"}


def test_a_crop_of_a_picture_as_small_as_itself_is_the_picture_or_its_mirror():
    image = picture(16, 16)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    seen = [crop(image, 16, np.random.default_rng(i)) for i in range(8)]
    assert all(torch.allclose(c, whole, atol=1e-5) or torch.allclose(c, whole.flip(2), atol=1e-5) for c in seen)
    assert len({tuple(c.flatten().tolist()) for c in seen}) == 2


def test_crops_reach_every_place_and_scale():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1))).convert("RGB")  # brighter to the right
    crops = [crop(ramp, 16, np.random.default_rng(i)) for i in range(200)]
    middles = torch.stack([c.mean() for c in crops])
    widths = torch.stack([(c[0, 0, -1] - c[0, 0, 0]).abs() * 127.5 for c in crops])
    assert middles.min() < -0.75 and middles.max() > 0.75
    assert widths.min() < 20 and widths.max() > 50  # 16 columns at the least, 64 at the most


def test_a_small_picture_is_enlarged():
    assert crop(picture(9, 12), 32, np.random.default_rng(0)).shape == (3, 32, 32)


def test_shards_and_files_give_the_same_pictures(tmp_path):
    (tmp_path / "files").mkdir(), (tmp_path / "shards").mkdir()
    contents = {f"{i}.png": png(picture(seed=i)) for i in range(4)}
    for name, content in contents.items():
        (tmp_path / "files" / name).write_bytes(content)
    for k in range(2):
        part = {f"{i}.{suffix}": contents[f"{i}.png"] if suffix == "png" else b"a caption" for i in range(2 * k, 2 * k + 2) for suffix in ("png", "txt")}
        shard(tmp_path / "shards" / f"{k:05d}.tar", part)
    files, shards = PictureCrops(tmp_path / "files", 16), PictureCrops(tmp_path / "shards", 16)
    assert len(files.sources) == len(shards.sources) == 4
    assert all(torch.equal(files.draw(i), shards.draw(i)) for i in range(8))


def test_unreadable_pictures_are_left_out_and_named_once(tmp_path):
    picture().save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    crops = PictureCrops(tmp_path, 16)
    with pytest.warns(UserWarning, match="left out broken.png") as told:
        drawn = [crops.draw(i) for i in range(12)]
    assert len(drawn) == 12 and crops.skipped == {"broken.png"} and len(told) == 1


def test_left_out_pictures_are_never_drawn(tmp_path):
    picture().save(tmp_path / "a.png"), picture().save(tmp_path / "b.png")
    assert [name for name, _ in PictureCrops(tmp_path, 16, leave_out=("b",)).sources] == ["a.png"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder / "nowhere", "no folder"),
        (lambda folder: folder, "no picture and no .tar"),
        (lambda folder: (folder / "x.tar").write_bytes(b"not a tar") and folder, "cannot read the shard"),
    ],
)
def test_wrong_folders_are_named(tmp_path, make, told):
    with pytest.raises(UserError, match=told):
        PictureCrops(make(tmp_path), 16)


def test_a_folder_of_broken_pictures_alone(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of 1 pictures can be read"):
        PictureCrops(tmp_path, 16).draw(0)
