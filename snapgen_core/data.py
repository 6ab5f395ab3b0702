"""Pictures from disk: scenes encoded once and cached, a user's own folders of captioned pictures, the shipped test photos."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .errors import UserError, reason
from .files import atomic_folder
from .latents import encode, latents_digest
from .paths import data_dir
from .scenes import draw_scene
from .threads import physical_cores

SHARD, BATCH = 4096, 64  # scenes in a shard of cached latents, and in a batch that is encoded
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow raises any of them
# The five whose licences ask for "share alike", so that no weights come from them, and a face.
TEST_PHOTOS = ("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus", "free_by_Peter_Nerlich", "greentock_by_Peter_Nerlich", "astronaut")
TEST_SIDE = 496  # the smallest has 500 pixels, and a latent pixel is 8 of them


def scenes_digest(seed: int, size: int) -> str:
    """Hex digest of the first scenes: a cache of scenes drawn by other rules is never mixed up with these."""
    total = hashlib.sha256()
    for scene in (draw_scene(seed, index, size=size) for index in range(32)):
        total.update(scene.prompt.text.encode())
        total.update(scene.image.numpy())
    return total.hexdigest()


class SceneLatents:
    """Training scenes 0 .. count-1 as latents, encoded once and kept as shards in `folder` (2 kB a scene at `tiny`).

    Attributes:
        latents: fp16 [count, 16, h, w], normalised (mean 0, standard deviation 1).
        captions: list of count strings.
    """

    def __init__(self, vae: AutoencoderKL, folder: Path, count: int, seed: int, size: int, progress: bool = True):
        folder = folder / f"scenes-{scenes_digest(seed, size)[:16]}-{latents_digest(vae)[:16]}"
        shards = [folder / f"{start:08d}" for start in range(0, count, SHARD)]
        read = {shard: _read_shard(shard) for shard in shards}
        todo = [shard for shard in shards if read[shard] is None]
        drawn = _draw([index for shard in todo for index in range(int(shard.name), int(shard.name) + SHARD)], seed, size)
        for shard in tqdm(todo, desc="encoding scenes", unit="shard", disable=not (progress and todo)):
            read[shard] = _write_shard(vae, shard, drawn)
        self.latents = torch.cat([latents for latents, _ in read.values()])[:count]
        self.captions = [caption for _, captions in read.values() for caption in captions][:count]


def _read_shard(shard: Path) -> tuple[Tensor, list[str]] | None:
    """(latents, captions) of a shard, or None where it is missing or damaged."""
    if not shard.exists():
        return None
    try:
        return load_file(shard / "latents.safetensors")["latents"], json.loads((shard / "captions.json").read_text("utf-8"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        warnings.warn(f"damaged latents in {shard} are computed again: {reason(error)}", stacklevel=3)
        return None


class _Scenes(Dataset):
    """Training scenes of these numbers: (picture [3, size, size], caption)."""

    def __init__(self, numbers: list[int], seed: int, size: int):
        self.numbers, self.seed, self.size = numbers, seed, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[Tensor, str]:
        scene = draw_scene(self.seed, self.numbers[place], size=self.size)
        return scene.image, scene.prompt.text


def _draw(numbers: list[int], seed: int, size: int) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Batches of scenes. Beside a GPU, which encodes faster than one process draws, every core draws."""
    workers = physical_cores() if numbers and torch.cuda.is_available() else 0
    return iter(DataLoader(_Scenes(numbers, seed, size), BATCH, num_workers=workers))


def _write_shard(vae: AutoencoderKL, shard: Path, drawn: Iterator[tuple[Tensor, tuple[str, ...]]]) -> tuple[Tensor, list[str]]:
    """Encode the next SHARD scenes of `drawn`."""
    latents, captions = [], []
    for images, texts in islice(drawn, SHARD // BATCH):
        latents.append(encode(vae, images).half().cpu())
        captions += texts
    whole = torch.cat(latents).contiguous()
    with atomic_folder(shard) as temporary:
        save_file({"latents": whole}, temporary / "latents.safetensors")
        (temporary / "captions.json").write_text(json.dumps(captions), "utf-8")
    return whole, captions


class ImageFolder(Dataset):
    """A user's own pictures with captions: item i is {"image": [3, size, size] in [-1, 1], "caption": str}.

    The caption of `cat.jpg` is, in this order: its line in `metadata.jsonl` ({"file_name": ..., "text": ...}), the
    text of `cat.txt`, or the file's name in words. Pictures are scaled and centre-cropped to a square. Every file is
    opened once at the start: those that cannot be read are skipped, counted and named in `skipped` and one warning.

    Raises:
        UserError: no such folder, or not one readable picture in it.
    """

    def __init__(self, folder: str | Path, size: int):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        self.size = size
        self.files: list[Path] = []
        self.skipped: dict[Path, str] = {}
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
            try:
                _load_square(path, size)
                self.files.append(path)
            except UNREADABLE as error:
                self.skipped[path] = str(error)
        if self.skipped:
            named = ", ".join(str(path.relative_to(folder)) for path in list(self.skipped)[:10])
            more = f" and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
            warnings.warn(f"{folder}: skipped {len(self.skipped)} unreadable of {len(self.skipped) + len(self.files)} pictures: {named}{more}", stacklevel=2)
        if not self.files:
            raise UserError(f"no readable picture in {folder}")
        described = _described(folder)
        self.captions = [described.get(path.relative_to(folder).as_posix()) or _caption(path) for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {"image": _load_square(self.files[index], self.size), "caption": self.captions[index]}


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """An RGB picture as it was taken, upright; transparency is laid on white."""
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")  # phones store a photo as the sensor lay
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _load_square(path: Path, size: int) -> Tensor:
    """[3, size, size] in [-1, 1]."""
    picture = open_picture(path)
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return to_tensor(picture)


def to_tensor(picture: Image.Image) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def _described(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return {line["file_name"]: line["text"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of {{file_name, text}} lines: {error}") from None


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if text.exists():
        return text.read_text("utf-8", errors="replace").strip()
    return path.stem.replace("_", " ").replace("-", " ")


def load_test_photos() -> Tensor:
    """The photos that no training draws, [6, 3, 496, 496]: their upper left parts, pixel by pixel."""
    files = [data_dir() / "photos" / f"{name}.webp" for name in TEST_PHOTOS]
    return torch.stack([to_tensor(Image.open(file))[:, :TEST_SIDE, :TEST_SIDE] for file in files])
