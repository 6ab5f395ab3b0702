"""A user's own pictures, cached latents, and the autoencoder's conventions."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from snapgen_core import data, latents
from snapgen_core.errors import UserError
from snapgen_core.scenes import draw_scene


def small_autoencoder(shift=0.25, scale=2.0):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=16, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=shift, scaling_factor=scale,
    ).eval()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (80, 40), "red").save(tmp_path / "red_wall.png")
    Image.new("RGB", (30, 90), "blue").save(tmp_path / "b.jpg", quality=95)
    (tmp_path / "b.txt").write_text("a blue door\n")
    (tmp_path / "sub").mkdir()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "sub" / "c.webp", lossless=True)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/c.webp", "text": "nothing at all"}) + "\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    whole = (tmp_path / "red_wall.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_image_folder_reads_skips_and_names(folder):
    with pytest.warns(UserWarning, match=r"skipped 2 unreadable of 5 pictures: broken.png, cut.png"):
        pictures = data.ImageFolder(folder, size=32)
    assert {p.name for p in pictures.skipped} == {"broken.png", "cut.png"}
    items = {item["caption"]: item["image"] for item in pictures}
    assert set(items) == {"red wall", "a blue door", "nothing at all"}
    assert all(image.shape == (3, 32, 32) for image in items.values())
    assert torch.allclose(items["red wall"], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 32, 32))
    assert torch.equal(items["nothing at all"], torch.ones(3, 32, 32))  # transparency lies on white


def test_image_folder_refuses_what_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        data.ImageFolder(tmp_path / "missing", 32)
    with pytest.raises(UserError, match="no readable picture"):
        data.ImageFolder(tmp_path, 32)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(UserError, match="metadata.jsonl"):
        data.ImageFolder(tmp_path, 32)


def test_centre_crop_keeps_the_middle(tmp_path):
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (32, 0, 64, 32))
    picture.save(tmp_path / "stripe.png")
    assert torch.equal(data.ImageFolder(tmp_path, 32)[0]["image"], torch.ones(3, 32, 32))


def test_latents_follow_sd3s_convention():
    vae = small_autoencoder()
    images = torch.stack([draw_scene(0, i).image for i in range(2)])
    z = latents.encode(vae, images)
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        assert torch.allclose(z, (raw - 0.25) * 2.0)
        assert torch.allclose(latents.decode(vae, z), vae.decode(raw).sample.clamp(-1, 1), atol=1e-5)


def test_scene_latents_are_cached_by_weights_and_continue(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 64)
    vae = small_autoencoder()
    first = data.SceneLatents(vae, tmp_path, 64, seed=3, size=64, progress=False)
    assert first.captions == [draw_scene(3, i).prompt.text for i in range(64)]
    direct = latents.encode(vae, torch.stack([draw_scene(3, i).image for i in range(64)]))
    assert torch.allclose(first.latents.float(), direct, atol=2e-3, rtol=2e-3)

    encoded = []
    monkeypatch.setattr(data, "encode", lambda vae, images: encoded.append(len(images)) or latents.encode(vae, images))
    more = data.SceneLatents(vae, tmp_path, 100, seed=3, size=64, progress=False)
    assert sum(encoded) == 64 and len(more.latents) == len(more.captions) == 100  # only the second shard was missing
    assert torch.equal(more.latents[:64], first.latents)

    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    data.SceneLatents(vae, tmp_path, 64, seed=3, size=64, progress=False)
    assert sum(encoded) == 128  # other weights never reuse these latents

    vae.register_to_config(shift_factor=0.5)
    data.SceneLatents(vae, tmp_path, 64, seed=3, size=64, progress=False)
    assert sum(encoded) == 192  # nor does another normalisation ...

    with torch.no_grad():
        vae.decoder.conv_in.bias += 1
    data.SceneLatents(vae, tmp_path, 64, seed=3, size=64, progress=False)
    assert sum(encoded) == 192  # ... but another decoder does

    cut = max(tmp_path.rglob("latents.safetensors"), key=lambda path: path.stat().st_mtime)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.warns(UserWarning, match="damaged latents"):
        again = data.SceneLatents(vae, tmp_path, 64, seed=3, size=64, progress=False)
    assert sum(encoded) == 256 and again.captions == first.captions and again.latents.isfinite().all()


def test_a_photo_stands_as_it_was_taken(tmp_path):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (0, 0, 64, 32))  # the sensor's upper half is the photo's right half
    orientation = Image.Exif()
    orientation[274] = 6
    picture.save(tmp_path / "phone.jpg", quality=95, exif=orientation)
    image = data.ImageFolder(tmp_path, 64)[0]["image"]
    assert image[:, :, 48:].mean() < -0.9 and image[:, :, :16].mean() > 0.9


def test_missing_autoencoder_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot load the autoencoder"):
        latents.load_autoencoder("tiny", tmp_path)


def test_small_and_paper_load_from_a_folder_in_the_hubs_layout(tmp_path):
    small_autoencoder().save_pretrained(tmp_path)
    vae = latents.load_autoencoder("paper", tmp_path)
    assert vae.config.scaling_factor == 2.0 and not any(p.requires_grad for p in vae.parameters())
