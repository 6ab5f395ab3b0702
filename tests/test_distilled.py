"""Stage `distilled`: whose turn reaches what, guesses noised again and judged beside the data, turns resumed."""

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from snapgen_core import flow
from snapgen_core.adversarial import discriminator_loss
from snapgen_core.diagnostics import concerns
from snapgen_core.distill import output_loss, scaled
from snapgen_core.errors import UserError
from snapgen_core.files import read_jsonl
from snapgen_core.latents import load_autoencoder
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
from snapgen_core.scales import SCALES
from snapgen_core.stages import distilled
from snapgen_core.stages.distilled import STEPS, DistilledStage
from snapgen_core.teachers import StoredText, drawn_latents, load_teacher, sample, save_reference
from snapgen_core.text import load_text_encoders
from snapgen_core.train import train
from snapgen_core.train.checkpoints import checkpoints
from snapgen_core.weights import save_half
from few_scenes import CAPTIONS, FewScenes


@pytest.fixture(scope="module")
def few():
    return FewScenes(load_text_encoders(SCALES["tiny"]))


@pytest.fixture(scope="module")
def turbo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turbo")
    torch.manual_seed(0)
    save_half(SD3Transformer2DModel(**SCALES["tiny"].teacher | {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 64}), folder)
    save_reference(load_autoencoder("tiny"), folder)
    return folder


@pytest.fixture
def stage(few, turbo_folder, monkeypatch):
    """A stage of batches of eight that goes on from the base student."""
    monkeypatch.setattr(distilled, "load_unet", lambda folder: load_unet(checkpoint_dir("tiny") / "base"))
    monkeypatch.setattr(distilled, "evaluate_unet", lambda *args, **settings: {"overall": 0.5})

    def build(seed=0, **options):
        made = DistilledStage("tiny", seed, teacher=turbo_folder, **options)
        made.data, made.prepare = few, lambda: None
        made.latents, made.captions = torch.randn(5, 16, 8, 8, generator=torch.Generator().manual_seed(1)).half(), CAPTIONS
        object.__setattr__(made.settings, "batch_size", 8)
        return made

    return build


def reached(module):
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_each_turn_trains_its_player_alone(stage):
    made = stage()
    for step, player in ((0, "discriminator"), (1, "unet")):
        made.module.zero_grad(set_to_none=True)
        loss, _ = made.module(**made.batch(step))
        loss.backward()
        assert reached(made.module) == {player}
        others = [p for name, p in made.module.named_parameters() if not name.startswith(player)]
        assert all(p.grad is None for p in others)  # not even zeros: AdamW would move by its momentum
    assert all(p.grad is None for p in made.teacher.parameters())


@pytest.mark.parametrize("only", [None, "adversarial", "kd"])
def test_the_students_loss_is_its_terms_gradient_and_all(stage, only):
    """By hand from Eq. 1, 7 and 9, walked back in one piece."""
    made = stage(only=only)
    batch = made.batch(1)
    loss, figures = made.module(**batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.module.unet.named_parameters()}
    made.module.zero_grad(set_to_none=True)

    x_t, own = made.module.place(**{name: batch[name] for name in ("x0", "eps", "sigma", "own", "context")}), batch["own"]
    noised_data = (1 - batch["sigma"])[:, None, None, None] * batch["x0"] + batch["sigma"][:, None, None, None] * batch["eps"]
    assert own.sum() == 4 and torch.allclose(x_t[~own], noised_data[~own])
    v = made.module.unet(x_t, 1000 * batch["sigma"], batch["context"]).sample
    guess = x_t - batch["sigma"][:, None, None, None] * v
    noised = (1 - batch["below"])[:, None, None, None] * guess + batch["below"][:, None, None, None] * batch["made_eps"]
    fooling = -made.module.discriminator(noised, batch["below"], batch["teachers_context"], batch["pooled"]).mean()
    with torch.no_grad():
        velocity = made.teacher.transformer(x_t, batch["teachers_context"], batch["pooled"], 1000 * batch["sigma"]).sample
    task, output = (batch["eps"] - batch["x0"] - v).square().mean(dim=(1, 2, 3)), output_loss(velocity, v)
    teaching = scaled(task[~own], output[~own], torch.tensor([1.0, 0.75, 0.5, 0.25])) / 2 + output[own].mean() / 2
    expected = {None: fooling + teaching, "adversarial": fooling, "kd": teaching}[only]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, p in made.module.unet.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=1e-6), name
    assert {name for name in figures if name.endswith("_pull")} == {f"{name}_pull" for name in (("adversarial", "kd") if only is None else (only,))}


def test_a_perfect_guess_cannot_be_told_from_the_data(stage):
    made = stage()
    batch = made.batch(0)
    made.module.guess = lambda x_t, sigma, context: (None, batch["x0"])
    batch["made_eps"] = batch["real_eps"]
    loss, figures = made.module(**batch)
    assert figures["accuracy"].item() == pytest.approx(0.5, abs=1e-6)
    logits = made.module.discriminator(flow.interpolate(batch["x0"], batch["real_eps"], batch["below"]), batch["below"], batch["teachers_context"], batch["pooled"])
    assert loss.item() == pytest.approx(discriminator_loss(logits, logits).item(), rel=1e-5)
    for level in (0.9, 0.75, 0.5, 0.0):
        at = batch["below"] == torch.tensor(level)
        assert at.sum() == 2 and figures[f"real at {level:.2f}"].item() == pytest.approx(logits[at].mean().item(), rel=1e-4)


def test_levels_are_those_of_the_sampler(stage):
    batch = stage().batch(1)
    assert batch["own"].tolist() == [False] * 4 + [True] * 4  # every level has both
    assert torch.allclose(batch["sigma"][:4], torch.tensor([1.0, 0.9, 0.75, 0.5])) and torch.allclose(batch["below"][:4], torch.tensor([0.9, 0.75, 0.5, 0.0]))
    assert torch.equal(batch["sigma"][:-1], flow.inference_sigmas(STEPS)[:-1].repeat(2)[:-1])


def test_student_and_teacher_read_the_prompt_of_what_the_teacher_has_drawn(stage, few):
    made = stage()
    batch = made.batch(1)
    again = made.batch(1)
    assert all(torch.equal(value, again[name]) for name, value in batch.items())
    for x0, context, pooled in zip(batch["x0"], batch["context"], batch["pooled"]):
        (row,) = [i for i, latent in enumerate(made.latents) if torch.equal(latent.float(), x0)]
        assert torch.allclose(pooled, few.pooled([CAPTIONS[row]])[0], atol=1e-3) and torch.allclose(context, StoredText(few)([CAPTIONS[row]])[0][0], atol=1e-3)


@torch.no_grad()
def test_the_students_own_places_are_those_where_its_pipeline_passes(stage):
    made = stage()
    batch = made.batch(1)
    places = made.module.place(batch["x0"], batch["eps"], batch["sigma"], torch.ones(8, dtype=torch.bool), batch["context"])
    unet = made.module.unet.eval()
    for place, eps, sigma, context in zip(places, batch["eps"], batch["sigma"], batch["context"]):
        x, levels = eps[None], flow.inference_sigmas(STEPS)
        for here, there in zip(levels, levels[1:]):
            if torch.isclose(here, sigma):
                break
            x = x + (there - here) * unet(x, 1000 * here.expand(1), context[None]).sample
        assert torch.allclose(place, x[0], atol=1e-4)
    assert not torch.allclose(places[1:4], batch["eps"][1:4], atol=0.05)


def test_the_few_step_teacher_draws_once(turbo_folder, tmp_path, monkeypatch):
    teacher, text = load_teacher("tiny", turbo_folder, few_steps=True)
    found = drawn_latents(teacher, text, CAPTIONS, "tiny", STEPS, tmp_path / "cache", batch=3)
    noise = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(teacher, text, CAPTIONS[:3], noise, flow.inference_sigmas(STEPS), 1.0)
    assert found.shape == (5, 16, 8, 8) and torch.equal(found[:3], expected.half())
    monkeypatch.setattr("snapgen_core.teachers.sample", None)  # from here on nothing is drawn
    assert torch.equal(drawn_latents(teacher, text, CAPTIONS, "tiny", STEPS, tmp_path / "cache"), found)
    with pytest.raises(TypeError):
        drawn_latents(teacher, text, CAPTIONS[1:], "tiny", STEPS, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(TypeError):
        drawn_latents(teacher, text, CAPTIONS, "tiny", STEPS, tmp_path / "cache")


def test_without_an_adversary_nobody_waits_for_the_heads(stage):
    assert [stage(only="kd").heads_turn(step) for step in range(3)] == [False] * 3
    assert [stage().heads_turn(step) for step in range(4)] == [True, False, False, False]


def test_it_is_watched_from_fixed_noise(stage, tmp_path):
    made = stage()
    average = {f"unet.{name}": tensor for name, tensor in made.module.unet.state_dict().items()}
    for step in (0, 7):
        made.watch(tmp_path, step, average)
    first, later = (Image.open(tmp_path / "samples" / f"step-{step:08d}.png") for step in (0, 7))
    assert first.tobytes() == later.tobytes() and first.width > 4 * 100
    assert [line["step"] for line in read_jsonl(tmp_path / "watch.jsonl")] == [0, 7]
    assert read_jsonl(tmp_path / "watch.jsonl")[0]["diversity"] > 0.05
    assert made.module.training  # what is trained was not touched


def test_concerns():
    def log(accuracy):
        return [{"step": i, "accuracy": accuracy} if i % 2 else {"step": i} for i in range(300)]

    watched = [{"step": 0, "diversity": 0.5}, {"step": 9, "diversity": 0.4}]
    assert concerns(log(0.8), watched) == [] and concerns([], []) == []
    assert "has won" in concerns(log(0.97), watched)[0] and "nothing to say" in concerns(log(0.5), watched)[0]
    assert concerns(log(0.5)[:100] + log(0.8)[:200], watched) == []  # old troubles are forgotten
    alike, = concerns(log(0.8), [*watched, {"step": 12, "diversity": 0.2}])
    assert "alike: diversity 0.200, 0.500 at the start" in alike


@pytest.mark.parametrize("halt", [1, 2], ids=["after the heads' turn", "after the student's"])
def test_stop_and_resume_in_either_turn_equals_one_run(stage, tmp_path, halt):
    train(stage(), tmp_path / "whole", steps=4, progress=False)
    train(stage(), tmp_path / "parts", steps=halt, progress=False)
    train(stage(), tmp_path / "parts", steps=4, progress=False)
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(("step", "first"), [(4, "judge"), (2, "task")], ids=["in the heads' turn", "in the student's"])
def test_a_nan_in_either_loss_stops_and_keeps_the_last_good_checkpoint(stage, tmp_path, step, first):
    made = stage()
    batch = made.batch
    made.batch = lambda number, *place: {name: value * math.nan if name == "eps" and number == step else value for name, value in batch(number, *place).items()}
    with pytest.raises(UserError, match=f"not finite at step {step + 1}: loss nan, {first} nan"):
        train(made, tmp_path, steps=6, save_every=0, progress=False)
    assert checkpoints(tmp_path)[-1].name == f"step-{step:08d}"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoints(tmp_path)[-1] / "state.safetensors").values())
