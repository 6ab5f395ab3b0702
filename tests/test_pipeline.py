"""The pipeline against its parts done by hand, saved and loaded like any other, and with the weights that ship."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import snapgen_core
from snapgen_core import flow
from snapgen_core.decoder import TinyDecoder
from snapgen_core.errors import UserError
from snapgen_core.latents import decode, load_decoder
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import SnapGenPipeline, load_unet, to_pil

PROMPTS = ["a red car", "two dogs"]


@pytest.fixture(scope="module")
def pipe():
    return snapgen_core.load("tiny", "base")


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_pictures(pipe):
    images = pipe(PROMPTS, num_inference_steps=2, generator=seeds(0, 1)).images
    assert [image.size for image in images] == [(64, 64)] * 2 and len(images[0].getcolors(10_000)) > 50


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_equals_the_loop_written_out(pipe, guidance):
    with torch.no_grad():
        context = pipe.text.encode(PROMPTS)
        x = torch.stack([torch.randn(16, 8, 8, generator=g) for g in seeds(3, 4)])
        for sigma, sigma_next in [(1, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0)]:
            t = torch.full((2,), 1000.0 * sigma)
            v = pipe.unet(x, t, context).sample
            empty = pipe.unet(x, t, torch.zeros_like(context)).sample
            x = x + (sigma_next - sigma) * (empty + guidance * (v - empty))
        expected = decode(pipe.vae, x)
    images = pipe(PROMPTS, num_inference_steps=4, guidance_scale=guidance, generator=seeds(3, 4), output_type="pt").images
    assert torch.allclose(images, expected, atol=1e-4)


def test_the_registered_scheduler_takes_the_same_steps(pipe):
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1].tolist())
    assert torch.allclose(pipe.scheduler.sigmas, pipe.sigmas(4), atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    both = pipe(PROMPTS, num_inference_steps=3, generator=seeds(0, 1), output_type="pt").images
    alone = pipe(PROMPTS[1], num_inference_steps=3, generator=seeds(1), output_type="pt").images
    assert torch.allclose(both[1:], alone, atol=1e-3)


def test_any_subset_of_encoders(pipe):
    def draw(encoders):
        return pipe("a red car", num_inference_steps=2, generator=seeds(0), encoders=encoders, output_type="pt").images

    assert not torch.allclose(draw(("clip_l",)), draw(("lm",)), atol=1e-3)
    assert torch.allclose(draw(()), draw([]))  # none: unconditional
    with pytest.raises(UserError, match="unknown text encoder 't5'"):
        draw(("t5",))


def test_preview_of_each_step_ends_in_the_picture(pipe):
    previews = []
    out = pipe("a key", num_inference_steps=3, generator=seeds(0), output_type="latent", on_step=lambda i, x0: previews.append((i, x0))).images
    assert [i for i, _ in previews] == [0, 1, 2] and torch.allclose(previews[-1][1], out, atol=1e-5)


def test_the_size_is_the_students_and_not_the_autoencoders(pipe):
    assert pipe.noise(1).shape == (1, 16, 8, 8)
    trained_for = pipe.config.image_size
    try:
        pipe.register_to_config(image_size=128)  # SD3's autoencoder names 1024 px, also beside a student of 256
        assert pipe.noise(2, seeds(0, 1)).shape == (2, 16, 16, 16)
    finally:
        pipe.register_to_config(image_size=trained_for)


def test_other_sizes(pipe):
    image = pipe("a key", num_inference_steps=1, size=96, generator=seeds(0)).images[0]
    assert image.size == (96, 96)


def test_save_and_load_give_the_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))
    again = SnapGenPipeline.from_pretrained(tmp_path)
    a, b = (p("a red car", num_inference_steps=2, generator=seeds(0), output_type="pt").images for p in (pipe, again))
    assert torch.allclose(a, b, atol=1e-5)


def test_a_tiny_decoder_draws_the_same_latent(pipe, tmp_path):
    torch.manual_seed(0)
    decoder = TinyDecoder.from_preset("tiny").eval()
    tiny = SnapGenPipeline(**pipe.components | {"decoder": decoder}, **{name: pipe.config[name] for name in ("clip_tokens", "lm_tokens", "image_size")})
    tiny.set_progress_bar_config(disable=True)

    def draw(pipe, kind):
        return pipe("a red car", num_inference_steps=2, generator=seeds(0), output_type=kind).images

    with torch.no_grad():
        expected = decoder(draw(pipe, "latent")).sample.clamp(-1, 1)
    assert torch.allclose(draw(tiny, "pt"), expected, atol=1e-5)
    assert not torch.allclose(expected, draw(pipe, "pt"), atol=0.1)
    tiny.save_pretrained(tmp_path)
    assert torch.allclose(draw(SnapGenPipeline.from_pretrained(tmp_path), "pt"), expected, atol=1e-5)


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ("", {}, "prompt is empty"),
        ("  \n", {}, "prompt is empty"),
        (["a dog", ""], {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ("a dog", {"num_inference_steps": 0}, "steps must be at least 1"),
        ("a dog", {"size": 63}, "multiple of 8"),
        ("a dog", {"output_type": "jpg"}, "output type"),
    ],
)
def test_settings_that_cannot_work(pipe, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        pipe(prompt, **settings)


def test_unknown_names():
    with pytest.raises(UserError, match="unknown scale 'huge'"):
        snapgen_core.load("huge")
    with pytest.raises(UserError, match="unknown stage 'best'"):
        snapgen_core.load("tiny", "best")
    with pytest.raises(UserError, match="unknown decoder 'huge'"):
        snapgen_core.load("tiny", decoder="huge")


def test_a_decoder_that_nobody_has_trained(tmp_path):
    with pytest.raises(UserError, match="no tiny decoder in .*: train one"):
        load_decoder(tmp_path)


@pytest.fixture
def student(tmp_path):
    return shutil.copytree(checkpoint_dir("tiny") / "base", tmp_path / "student")


def test_truncated_foreign_or_missing_student(student):
    weights = student / "diffusion_pytorch_model.safetensors"
    load_unet(student)
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**{k: v for k, v in tensors.items() if k != name}, "stranger": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="do not fit"):
        load_unet(student)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the student"):
        load_unet(student)
    (student / "config.json").unlink()
    with pytest.raises(UserError, match="no student"):
        load_unet(student)


def test_sigmas_of_the_pipeline_are_explicit(pipe):
    assert torch.equal(pipe.sigmas(4), flow.inference_sigmas(4, 3.0))


def test_to_pil_rounds_to_the_nearest_value():
    image = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 2, 2)
    assert to_pil(image)[0].getpixel((0, 0)) == (0, 128, 255)
