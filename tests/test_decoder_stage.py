"""The decoder's trainings: the loss by hand, gradients where they belong, data that never mix, what ships."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from snapgen_core.adversarial import adaptive_weight, fooling_loss
from snapgen_core.cli import main
from snapgen_core.data import TEST_PHOTOS, load_test_photos
from snapgen_core.decoder import TinyDecoder
from snapgen_core.errors import UserError
from snapgen_core.latents import encode, load_autoencoder, load_decoder, reconstruct
from snapgen_core.paths import checkpoint_dir, data_dir
from snapgen_core.profile import count_parameters
from snapgen_core.scenes import draw_scene
from snapgen_core.stages import build_stage, photos
from snapgen_core.stages import decoder as decoder_stage
from snapgen_core.stages.decoder import ADVERSARIAL, MAX_LEVEL, PERCEPTUAL, DecoderStage, DecoderTraining
from snapgen_core.train import train


@pytest.fixture(scope="module")
def stage():
    return DecoderStage("tiny", 0)


def few(stage, step=0, count=3):
    return {name: value[:count] for name, value in stage.batch(step).items()}


def test_the_tiny_one_has_at_most_a_twentieth_of_the_full_ones_parameters():
    assert 20 * count_parameters(TinyDecoder.from_preset("tiny")) <= count_parameters(load_autoencoder("tiny").decoder)


def test_batches_are_a_pure_function_of_seed_and_step(stage):
    again = DecoderStage("tiny", 0)
    assert all(torch.equal(value, again.batch(3)[name]) for name, value in stage.batch(3).items())
    assert not torch.equal(stage.batch(3)["image"], stage.batch(4)["image"])
    parts = [stage.batch(3, rank, 2)["image"] for rank in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), stage.batch(3)["image"])


def test_latents_are_those_of_the_frozen_encoder_with_noise(stage):
    batch = stage.batch(0)
    clean = encode(load_autoencoder("tiny"), batch["image"])
    spread = (batch["latent"] - clean).flatten(1).std(1)
    assert (spread <= 1.1 * MAX_LEVEL).all() and spread.min() < 0.2 * MAX_LEVEL < 0.6 * MAX_LEVEL < spread.max()


def test_the_loss_by_hand(stage):
    module, batch = stage.module, few(stage)
    for judged in (0.0, 1.0):
        loss, _ = module(batch["image"], batch["latent"], torch.tensor([judged]))
        made, real = module.decoder(batch["latent"]).sample, batch["image"]
        rec = ((made - real) ** 2).mean() + PERCEPTUAL["lite0"] * module.distance(made, real).mean()
        d_real, d_made = module.discriminator(real), module.discriminator(made.detach())
        expected = rec + ((1 - d_real).clamp(min=0).mean() + (1 + d_made).clamp(min=0).mean()) / 2
        if judged:
            fooling = fooling_loss(module.discriminator, made)
            expected = expected + ADVERSARIAL * adaptive_weight(rec, fooling, module.decoder.conv_out.weight) * fooling
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_discriminator_learns_from_its_own_loss_alone(stage):
    module, batch = stage.module, few(stage)
    gradients = []
    for judged in (0.0, 1.0):
        module.zero_grad()
        module(batch["image"], batch["latent"], torch.tensor([judged]))[0].backward()
        gradients.append([p.grad.clone() for p in module.discriminator.parameters()])
        assert all(p.grad is not None for p in module.decoder.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_the_decoder_listens_to_the_discriminator_later(stage):
    start = stage.judged_from
    assert 0 < start < stage.settings.steps
    assert [stage.batch(step)["judged"].item() for step in (0, start - 1, start)] == [0, 0, 1]


def test_a_few_steps_on_one_batch_help():
    torch.manual_seed(0)
    stage = DecoderStage("tiny", 0)
    batch = few(stage, count=8)
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss, figures = stage.module(**batch | {"judged": torch.zeros(1)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(figures["mse"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_ships_is_the_decoder_alone(stage, tmp_path):
    stage.save(tmp_path)
    again = load_decoder(tmp_path / "decoder")
    assert {p.name for p in tmp_path.iterdir()} == {"decoder"} and not any(p.requires_grad for p in again.parameters())
    warm = DecoderStage("tiny", 1)
    warm.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(warm.module.decoder.state_dict().values(), again.state_dict().values()))


def test_reconstruct_takes_either_decoder(stage):
    vae, images = load_autoencoder("tiny"), torch.rand(3, 3, 64, 64) * 2 - 1
    own, tiny = reconstruct(vae, images, batch=2), reconstruct(vae, images, stage.module.decoder.eval(), batch=2)
    assert own.shape == tiny.shape == images.shape and own.abs().max() <= 1 and not torch.allclose(own, tiny)


def test_a_large_decoder_is_scored_on_the_shipped_photos(stage, monkeypatch):
    stage.prepare()
    monkeypatch.setattr(stage, "scale", "small")
    monkeypatch.setattr("snapgen_core.stages.decoder.load_test_photos", lambda: load_test_photos()[:2, :, :64, :64])
    scores = stage.score()
    photos = load_test_photos()[:2, :, :64, :64]
    mse = (reconstruct(stage.vae, photos) - photos).square().flatten(1).mean(1)
    assert scores["photos.full_psnr_db"] == pytest.approx((10 * (4 / mse).log10()).mean().item(), rel=1e-4)
    assert scores["photos.behind_db"] == pytest.approx(scores["photos.full_psnr_db"] - scores["photos.psnr_db"], rel=1e-4)
    assert scores["photos.behind_spread_db"] >= 0


def test_a_users_pictures_are_what_it_learns_from(tmp_path):
    Image.fromarray(np.full((80, 90, 3), (255, 0, 0), dtype=np.uint8)).save(tmp_path / "red.png")
    image = build_stage("decoder", "tiny", 0, data=tmp_path).draw(range(2))
    assert image.shape == (2, 3, 64, 64) and torch.allclose(image[:, 0], torch.ones(())) and torch.allclose(image[:, 1:], -torch.ones(()))


def test_a_run_goes_on_with_the_pictures_it_began_with(tmp_path):
    def stage(folder):
        built = build_stage("decoder", "tiny", 0, data=folder)
        built.score, built.settings = dict, replace(built.settings, batch_size=2)
        return built

    for name in ("one folder", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (80, 80), "red").save(tmp_path / name / "red.png")
    train(stage(tmp_path / "one folder"), tmp_path / "run", steps=1, progress=False)
    for folder, told in ((tmp_path / "other", "not .*other"), (None, "not left out")):
        with pytest.raises(UserError, match="holds a run with data .*one folder, " + told):
            train(stage(folder), tmp_path / "run", steps=2, progress=False)
    train(stage(tmp_path / "one folder"), tmp_path / "run", steps=2, progress=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["command"].endswith(f"--steps 2 --data '{tmp_path / 'one folder'}'")


def one_step_and_two(folder):
    """Runs of one step, and of two, of which the second listens to the discriminator; no noise, which each process draws for itself."""
    decoder_stage.MAX_LEVEL = 0
    for steps in (1, 2):
        stage = DecoderStage("tiny", 0)
        stage.score, stage.judged_from = dict, 1
        stage.settings = replace(stage.settings, batch_size=4, warmup_steps=1, ema_decay=0.0)
        train(stage, folder / str(steps), steps=steps, progress=False)


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_stage, "MAX_LEVEL", 0)
    one_step_and_two(tmp_path / "alone")
    script = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from test_decoder_stage import one_step_and_two; one_step_and_two(Path(sys.argv[2]))"
    (tmp_path / "two.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, tmp_path / "two.py", os.path.dirname(__file__), tmp_path / "both"], check=True, capture_output=True, timeout=300)
    begun = DecoderStage("tiny", 0).module.state_dict()
    for steps in ("1", "2"):
        alone, both = (load_file(tmp_path / name / steps / "model.safetensors") for name in ("alone", "both"))
        assert alone.keys() == both.keys() == begun.keys()
        moved, apart = (torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean() for a, b in ((alone, begun), (alone, both)))
        # Adam's first step has the size of the rate whatever the gradient's; later the adversarial weight is each process's own.
        assert apart < (0.01 if steps == "1" else 0.3) * moved


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["decoder", "--scale", "paper"], "name a folder of them, or of WebDataset shards, with --data"),
        (["decoder", "--data", "nowhere"], "no folder nowhere"),
        (["base", "--data", "."], "stage base takes no --data, only decoder does"),
        (["photo_decoder", "--perceptual", "lpips"], "stage photo_decoder takes no --perceptual"),
        (["decoder", "--perceptual", "ssim"], "unknown perceptual distance 'ssim': choose lite0 or lpips"),
        (["decoder", "--perceptual", "lpips"], "install the extra `metrics` where torchvision works, or take --perceptual lite0"),
        (["photo_decoder", "--scale", "small"], "train the stage decoder on a folder of your own"),
    ],
)
def test_wrong_options_get_one_line(arguments, told, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments, "--run-dir", str(tmp_path / "run")]) == 2
    assert told in capfd.readouterr()[1]


def test_training_and_test_photos_never_meet():
    names = {path.stem for path in (data_dir() / "photos").glob("*.webp")}
    mix = photos.PhotoMix(0, 64)
    drawn = {name.removesuffix(".webp") for name, _ in mix.crops.sources}
    assert set(TEST_PHOTOS) < names and drawn == names - set(TEST_PHOTOS)
    licences = (data_dir() / "photos" / "ATTRIBUTION.csv").read_text("utf-8").splitlines()
    assert not any("CC-BY-SA" in line and line.split(".webp")[0] in drawn for line in licences)


def test_photo_crops_are_pure_and_varied():
    a, b = photos.PhotoMix(0, 64), photos.PhotoMix(0, 64)
    assert torch.equal(a(range(6)), b(range(6))) and len({tuple(x.flatten()[:50].tolist()) for x in a(range(6))}) == 6


def test_test_photos_fit_the_encoder():
    tensor = load_test_photos()
    assert tensor.shape == (6, 3, 496, 496) and tensor.min() >= -1 and tensor.max() <= 1


def test_the_photo_decoder_reads_the_photo_autoencoder():
    assert photos.PhotoDecoderStage.encoder == photos.PhotoAutoencoderStage.name
    assert issubclass(photos.PhotoDecoderStage, DecoderStage)
    with pytest.raises(UserError):
        photos.PhotoDecoderStage("paper", 0)
    assert isinstance(photos.PhotoDecoderStage("tiny", 0).module, DecoderTraining)


def psnr_by_hand(made, images):
    return (10 * (4 / (made - images).square().flatten(1).mean(1)).log10()).mean().item()


def test_the_shipped_decoder_is_nearly_as_good_as_the_full_one():
    vae, tiny = load_autoencoder("tiny"), load_decoder(checkpoint_dir("tiny") / "decoder")
    scenes = torch.stack([draw_scene(7, i, split).image for split in ("seen", "held_out") for i in range(48)])  # not the card's
    assert psnr_by_hand(reconstruct(vae, scenes, tiny), scenes) > psnr_by_hand(reconstruct(vae, scenes), scenes) - 0.5


def test_so_is_the_one_for_photos():
    vae, tiny = load_autoencoder("tiny", checkpoint_dir("tiny") / "photo_autoencoder"), load_decoder(checkpoint_dir("tiny") / "photo_decoder")
    photos = load_test_photos()
    assert psnr_by_hand(reconstruct(vae, photos, tiny, batch=1), photos) > psnr_by_hand(reconstruct(vae, photos, batch=1), photos) - 1


def test_norms_are_compared_as_if_each_decoder_were_alone():
    stage = build_stage("decoder_norms", "tiny")
    batch = few(stage)
    loss, figures = stage.module(**batch)
    loss.backward()
    alone = 0
    for norm, decoder in stage.module.decoders.items():
        together = [p.grad.clone() for p in decoder.parameters()]
        decoder.zero_grad()
        made = decoder(batch["latent"]).sample
        one = ((made - batch["image"]) ** 2).mean() + PERCEPTUAL["lite0"] * stage.module.distance(made, batch["image"]).mean()
        one.backward()
        alone += one.item()
        assert figures[f"mse_{norm}"].item() == pytest.approx(((made - batch["image"]) ** 2).mean().item(), rel=1e-5)
        assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(together, decoder.parameters()))
    assert loss.item() == pytest.approx(alone, rel=1e-5)
