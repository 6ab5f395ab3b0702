"""Random crops of a user's pictures, from a folder or from WebDataset shards: a pure function of (seed, index)."""

import io
import tarfile
import warnings
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .data import IMAGE_SUFFIXES, UNREADABLE, open_picture, to_tensor
from .errors import UserError, reason
from .threads import physical_cores


class PictureCrops:
    """Square crops [3, size, size] in [-1, 1] of the pictures in `folder`, and in the .tar shards there.

    A crop has a random place and scale (from as small as the picture allows to pixel by pixel) and is flipped half of
    the time. A picture that cannot be read is left out, named once in a warning and counted in `skipped`; the next one
    takes its place.

    Raises:
        UserError: no such folder, no picture in it, or not one that can be read.
    """

    def __init__(self, folder: str | Path, size: int, seed: int = 0, leave_out: Collection[str] = ()):
        """`leave_out`: names, without suffix, of files in `folder` that are never drawn."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        self.size, self.seed = size, seed
        self.sources: list[tuple[str, Callable[[], Image.Image]]] = []  # (name, how to open it)
        self.skipped: set[str] = set()
        for path in sorted(path for path in folder.rglob("*") if path.stem not in leave_out):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self.sources.append((str(path.relative_to(folder)), lambda path=path: open_picture(path)))
            elif path.suffix == ".tar":
                self.sources += _members(path, str(path.relative_to(folder)))
        if not self.sources:
            raise UserError(f"no picture and no .tar of pictures in {folder}")

    def __call__(self, indices: Iterable[int]) -> Tensor:
        """The crops of those numbers, [N, 3, size, size], a thread a core: Pillow reads and scales without Python's lock."""
        with ThreadPoolExecutor(physical_cores()) as pool:
            return torch.stack(list(pool.map(self.draw, indices)))

    def draw(self, index: int) -> Tensor:
        """Crop number `index`, [3, size, size]."""
        rng = np.random.default_rng([self.seed, index])
        first = int(rng.integers(len(self.sources)))
        for k in range(len(self.sources)):
            name, read = self.sources[(first + k) % len(self.sources)]
            if name in self.skipped:
                continue
            try:
                return crop(read(), self.size, rng)
            except UNREADABLE as error:
                if name not in self.skipped:  # another thread may have met it too
                    self.skipped.add(name)
                    warnings.warn(f"left out {name}, which cannot be read: {reason(error)} ({len(self.skipped)} so far)", stacklevel=2)
        raise UserError(f"none of {len(self.sources)} pictures can be read")


def _members(shard: Path, title: str) -> list[tuple[str, Callable[[], Image.Image]]]:
    """The pictures of a WebDataset shard. Only their places are kept: a shard is read through once, at the start."""
    try:
        with tarfile.open(shard, "r:") as file:  # not compressed, or a member has no place to read it from
            places = [(member.name, member.offset_data, member.size) for member in file if Path(member.name).suffix.lower() in IMAGE_SUFFIXES]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the shard {shard}: {reason(error)}") from None

    def read(start: int, length: int) -> Image.Image:
        with shard.open("rb") as file:
            file.seek(start)
            return open_picture(io.BytesIO(file.read(length)))

    return [(f"{title}/{name}", lambda start=start, length=length: read(start, length)) for name, start, length in places]


def crop(picture: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
    """A random square of `picture`, scaled to [3, size, size] in [-1, 1]."""
    shorter = min(picture.size)
    side = shorter if shorter <= size else int(np.exp(rng.uniform(np.log(size), np.log(shorter))))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    square = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        square = ImageOps.mirror(square)
    return to_tensor(square)
