"""Stage `turbo`: four straight pieces that are the long run's, place by place."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from snapgen_core import flow
from snapgen_core.latents import load_autoencoder
from snapgen_core.scales import SCALES
from snapgen_core.stages import turbo
from snapgen_core.stages.turbo import GUIDANCE, LONG, STEPS, TurboStage
from snapgen_core.teachers import load_teacher, save_reference
from snapgen_core.text import load_text_encoders
from snapgen_core.weights import save_half
from few_scenes import FewScenes


@pytest.fixture
def stage(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_half(SD3Transformer2DModel(**SCALES["tiny"].teacher | {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 64}), tmp_path / "teacher")
    save_reference(load_autoencoder("tiny"), tmp_path / "teacher")
    monkeypatch.setattr(turbo, "checkpoint_dir", lambda scale: tmp_path)
    made = TurboStage("tiny", 0)
    made.data = FewScenes(load_text_encoders(SCALES["tiny"]))
    object.__setattr__(made.settings, "batch_size", 8)
    return made


def test_four_steps_of_the_targets_are_the_guided_long_run(stage):
    batch = stage.batch(3)
    count = 8 // STEPS
    x, context, pooled = batch["x"][:count], batch["context"][:count], batch["pooled"][:count]
    sigmas = flow.inference_sigmas(LONG)
    with torch.no_grad():
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):  # Eq. 3 and guidance, written out
            t = (1000 * sigma).expand(count)
            free = stage.guide.transformer(x, torch.zeros_like(context), torch.zeros_like(pooled), t).sample
            bound = stage.guide.transformer(x, context, pooled, t).sample
            x = x + (sigma_next - sigma) * (free + GUIDANCE * (bound - free))
    short = batch["x"][:count]
    for k, (sigma, sigma_next) in enumerate(zip(flow.inference_sigmas(STEPS), flow.inference_sigmas(STEPS)[1:])):
        piece = slice(k * count, (k + 1) * count)
        assert torch.allclose(batch["x"][piece], short, atol=1e-4) and (batch["sigma"][piece] == sigma).all()
        short = flow.euler_step(short, batch["target"][piece], sigma, sigma_next)
    assert torch.allclose(short, x, atol=1e-3) and not torch.allclose(short, batch["x"][:count], atol=0.1)


def test_it_begins_as_the_teacher_and_learns(stage):
    for mine, teachers in zip(stage.module.transformer.parameters(), stage.guide.transformer.parameters()):
        assert torch.equal(mine, teachers) and mine.requires_grad and not teachers.requires_grad
    batch = stage.batch(0)
    assert all(torch.equal(value, stage.batch(0)[name]) for name, value in batch.items())
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss, _ = stage.module(**batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_what_it_saves_can_teach(stage, tmp_path):
    stage.save(tmp_path)
    teacher, _ = load_teacher("tiny", tmp_path / "turbo")
    again = TurboStage("tiny", 1)
    again.load(tmp_path)
    for name, tensor in again.module.transformer.state_dict().items():
        assert torch.equal(tensor, teacher.transformer.state_dict()[name]), name
