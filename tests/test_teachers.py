"""The teachers: the twin's start and its text, the hook, SD3.5's layout with small random weights, and refusals."""


import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from snapgen_core import flow, teachers
from snapgen_core.errors import UserError
from snapgen_core.latents import load_autoencoder
from snapgen_core.scales import SCALES
from snapgen_core.stages import text as stage_text
from snapgen_core.teachers import Teacher, TwinText, build_twin, load_teacher, load_transformer, reference_latents, sample, save_reference
from snapgen_core.text import fuse, load_text_encoders
from snapgen_core.weights import save_half

SMALL = SCALES["tiny"].teacher | {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 64}


def random_twin(**changes):
    torch.manual_seed(0)
    return SD3Transformer2DModel(**(SMALL | changes))


@pytest.fixture(scope="module")
def text():
    return TwinText(load_text_encoders(SCALES["tiny"]))


@pytest.fixture
def twin_folder(tmp_path):
    save_half(random_twin(), tmp_path)
    save_reference(load_autoencoder("tiny"), tmp_path)
    return tmp_path


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 16, 8, 8, generator=generator), 1000 * torch.rand(count, generator=generator), torch.randn(count, 48, 384, generator=generator), torch.randn(count, 256, generator=generator)


def test_a_new_twin_says_nothing_and_fits_the_bill():
    twin = build_twin("tiny")
    x, t, context, pooled = inputs()
    assert twin(x, context, pooled, t).sample.abs().max() == 0
    assert 2 * sum(p.numel() for p in twin.parameters()) < 16e6
    with pytest.raises(UserError, match="stable-diffusion-3.5-large"):
        build_twin("paper")


def test_features_are_what_the_last_layers_read():
    """The velocity computed from the features with the transformer's own norm and projection is the velocity."""
    model = random_twin()
    teacher = Teacher(model)
    x, t, context, pooled = inputs()
    velocity, features = teacher(x, t, context, pooled)
    assert torch.equal(velocity, model(x, context, pooled, t).sample)
    assert features.shape == (3, *teacher.feature_size(8)) == (3, 64, 8, 8)
    tokens = features.flatten(2).transpose(1, 2)
    again = model.proj_out(model.norm_out(tokens, model.time_text_embed(t, pooled)))  # (B, 64, 16), patches of one
    assert torch.allclose(again.transpose(1, 2).reshape(3, 16, 8, 8), velocity, atol=1e-5)


def test_patches_keep_their_places():
    """A change of one corner changes the features there most."""
    teacher = Teacher(random_twin(patch_size=2, num_layers=1))
    x, t, context, pooled = inputs(1)
    assert teacher.feature_size(8) == (64, 4, 4)
    other = x.clone()
    other[:, :, 6:, :2] += 5  # lower left
    change = (teacher(other, t, context, pooled)[1] - teacher(x, t, context, pooled)[1]).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 4) == (3, 0)


def test_a_teacher_is_frozen():
    teacher = Teacher(random_twin()).train()
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    x, t, context, pooled = inputs()
    x.requires_grad_()
    velocity, features = teacher(x, t, context, pooled)
    assert not velocity.requires_grad and not features.requires_grad


def test_the_twins_text(text):
    context, pooled = text(["a red car", "", "a dog"])
    assert torch.allclose(context[0], text.encoders.encode(["a red car"])[0], atol=1e-5) and context[1].abs().max() == 0
    assert context.shape == (3, 48, 384) and pooled.shape == (3, 256) and pooled[1].abs().max() == 0
    tokens = text.encoders.tokenizers["clip_g"](["a dog"], return_tensors="pt")["input_ids"]
    assert torch.allclose(pooled[2, 128:], text.encoders.clip_g(tokens).text_embeds[0], atol=1e-5)
    parts = text.encoders.encode_parts(["a dog"])
    assert torch.allclose(context[2:], fuse(*parts), atol=1e-5)


def test_drawing_by_hand(text):
    """Two Euler steps, guided, written out."""
    teacher, noise = Teacher(random_twin()), torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, sigmas = ["a red car", "a dog"], flow.inference_sigmas(2)
    drawn = sample(teacher, text, prompts, noise, sigmas, guidance=3.0)
    x = noise
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        t = 1000 * now.expand(2)
        with_text, without = (teacher(x, t, *text(words))[0] for words in (prompts, ["", ""]))
        x = x + (then - now) * (without + 3.0 * (with_text - without))
    assert torch.allclose(drawn, x, atol=1e-4)


def test_the_twin_loads(twin_folder):
    teacher, text = load_teacher("tiny", twin_folder)
    assert teacher.transformer.dtype == torch.float32 and isinstance(text, TwinText)
    assert torch.allclose(teacher.transformer.proj_out.weight, random_twin().proj_out.weight, atol=1e-3)


def test_no_teacher_and_damaged_ones(twin_folder, tmp_path):
    with pytest.raises(UserError, match="no teacher in .*nowhere: train one with `snapgen train teacher`"):
        load_teacher("tiny", tmp_path / "nowhere")
    (twin_folder / "latents.safetensors").unlink()
    with pytest.raises(UserError, match="cannot tell which latents"):
        load_teacher("tiny", twin_folder)
    weights = twin_folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the teacher"):
        load_transformer(twin_folder)


def test_latents_of_another_autoencoder_are_refused(twin_folder):
    """Even of one that differs in nothing but its weights."""
    vae = load_autoencoder("tiny")
    torch.manual_seed(1)
    other = AutoencoderKL.from_config(vae.config)
    save_reference(other, twin_folder)
    with pytest.raises(UserError, match="different autoencoders"):
        load_teacher("tiny", twin_folder)
    ours = reference_latents(vae)
    save_file({"reference": ours.half().float()}, twin_folder / "latents.safetensors")  # rounding is no difference
    load_teacher("tiny", twin_folder)
    save_file({"reference": 1.1 * ours}, twin_folder / "latents.safetensors")  # another scaling factor is
    with pytest.raises(UserError, match="different autoencoders"):
        load_teacher("tiny", twin_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, "works on 4 latent channels, the student of scale tiny on 16"),
        ({"patch_size": 3}, "features do not fit: it cuts latents into patches of 3"),
        ({"pos_embed_max_size": 4}, "at most 4 a side, and the student's have 8"),
        ({"joint_attention_dim": 128}, "reads text of widths 128 and 256, its encoders give 384 and 256"),
        ({"pooled_projection_dim": 32}, "reads text of widths 384 and 32"),
    ],
)
def test_teachers_that_do_not_fit(tmp_path, changes, message):
    save_half(random_twin(**changes), tmp_path)
    save_reference(load_autoencoder("tiny"), tmp_path)
    with pytest.raises(UserError, match=message):
        load_teacher("tiny", tmp_path)


# ------------------------------------------------------------------------------------------------- SD3.5's layout


@pytest.fixture(scope="module")
def sd35_folder(tmp_path_factory):
    """A whole pipeline as diffusers saves SD3.5, with small random networks."""
    folder = tmp_path_factory.mktemp("sd35")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=24, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=16, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06,
    )
    tokenizer = stage_text.clip_tokenizer(77)
    clips = []
    for width, projection in ((16, 8), (32, 16)):
        config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77, projection_dim=projection, bos_token_id=0, eos_token_id=2)
        clips.append(CLIPTextModelWithProjection(config))
    t5 = T5EncoderModel(T5Config(vocab_size=106, d_model=64, d_kv=8, d_ff=64, num_layers=2, num_heads=2))
    t5_tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -2.0), ("▁car", -2.0)])
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clips[0], tokenizer=tokenizer,
        text_encoder_2=clips[1], tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def same_vae(sd35_folder, monkeypatch):
    """The student's autoencoder, which the hub has, is the folder's."""
    vae = AutoencoderKL.from_pretrained(sd35_folder, subfolder="vae")
    monkeypatch.setattr(teachers, "load_autoencoder", lambda scale: vae)


def test_sd35_loads_in_bf16_and_teaches(sd35_folder, same_vae):
    teacher, text = load_teacher("small", sd35_folder)
    assert teacher.transformer.dtype == torch.bfloat16 and teacher.feature_size(32) == (32, 16, 16)
    context, pooled = text(["a red car", ""])
    assert context.shape == (2, 77 + 256, 64) and pooled.shape == (2, 24)
    velocity, features = teacher(torch.randn(2, 16, 32, 32), torch.tensor([900.0, 10.0]), context, pooled)
    assert velocity.shape == (2, 16, 32, 32) and features.shape == (2, 32, 16, 16) and features.isfinite().all()


def test_sd35_without_t5_reads_zeros_there(sd35_folder, same_vae, tmp_path):
    _, whole = load_teacher("small", sd35_folder)
    _, less = load_teacher("small", sd35_folder, t5=False)
    a, b = whole(["a red car"])[0], less(["a red car"])[0]
    assert a[:, 77:].abs().max() > 0 and b[:, 77:].abs().max() == 0 and torch.equal(a[:, :77], b[:, :77])
    folder = tmp_path / "without"  # a folder that never had one
    folder.mkdir()
    for part in sd35_folder.iterdir():
        if part.name not in ("text_encoder_3", "tokenizer_3"):
            (folder / part.name).symlink_to(part)
    assert torch.equal(load_teacher("small", folder)[1](["a red car"])[0], b)


def test_sd35_of_another_autoencoder_or_in_parts(sd35_folder, tmp_path, monkeypatch):
    torch.manual_seed(5)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(sd35_folder / "vae"))
    monkeypatch.setattr(teachers, "load_autoencoder", lambda scale: other)
    with pytest.raises(UserError, match="different autoencoders"):
        load_teacher("small", sd35_folder)
    with pytest.raises(UserError, match="it has no transformer; a teacher is a whole SD3.5 pipeline"):
        load_teacher("small", tmp_path)
    monkeypatch.setattr(teachers, "load_autoencoder", lambda scale: AutoencoderKL.from_pretrained(sd35_folder, subfolder="vae"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in sd35_folder.iterdir():
        if part.name != "tokenizer":
            (broken / part.name).symlink_to(part)
    with pytest.raises(UserError, match="it has no tokenizer;"):
        load_teacher("small", broken)


def test_sd35_whose_t5_has_no_tokenizer_is_refused(sd35_folder, same_vae, tmp_path):
    for part in sd35_folder.iterdir():
        if part.name != "tokenizer_3":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(UserError, match="it has no tokenizer_3;"):
        load_teacher("small", tmp_path)


def test_a_missing_hub_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load the teacher in stabilityai/stable-diffusion-3.5-large") as error:
        load_teacher("paper")
    assert "\n" not in str(error.value)


def test_sd35_that_lacks_a_layer_is_refused(sd35_folder, same_vae, tmp_path):
    """diffusers alone would go on with random numbers there."""
    for part in sd35_folder.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    held = load_file(sd35_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_bytes((sd35_folder / "transformer" / "config.json").read_bytes())
    weights = {name: tensor for name, tensor in held.items() if not name.startswith("transformer_blocks.2.attn.to_out")}
    assert len(weights) < len(held)
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights are another model's, 2 tensors do not fit"):
        load_teacher("small", tmp_path)
