"""Stage `teacher`: what it is shown, and what it leaves for those who load it."""

import pytest
import torch

from snapgen_core.errors import UserError
from snapgen_core.scales import SCALES
from snapgen_core.stages.teacher import TeacherStage
from snapgen_core.teachers import load_teacher
from snapgen_core.text import fuse, load_text_encoders
from few_scenes import CAPTIONS, FewScenes

@pytest.fixture(scope="module")
def stage():
    made = TeacherStage("tiny", 0)
    made.data = FewScenes(load_text_encoders(SCALES["tiny"]))
    return made


def test_batches_are_a_pure_function_of_seed_and_step(stage):
    a, b = stage.batch(5), stage.batch(5)
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["eps"], stage.batch(6)["eps"])
    assert not torch.equal(stage.batch(5, rank=0, world=2)["eps"], stage.batch(5, rank=1, world=2)["eps"])


def test_the_text_is_dropped_whole(stage):
    """Context and pooled embeddings together, for one sample in ten; never one encoder alone."""
    batches = [stage.batch(step) for step in range(16)]
    context, pooled = (torch.cat([batch[name] for batch in batches]) for name in ("context", "pooled"))
    reads = context.flatten(1).any(dim=1)
    assert torch.equal(reads, pooled.any(dim=1))
    whole = fuse(*stage.data.gather(CAPTIONS))
    assert all(any(torch.equal(one, caption) for caption in whole) for one in context[reads])
    count = len(reads)
    assert abs((~reads).float().mean().item() - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5


def test_the_loss_is_eq_2(stage):
    batch = {name: value[:4] for name, value in stage.batch(0).items()}
    loss, _ = TeacherStage("tiny", 0).module(**batch)
    assert loss.item() == pytest.approx((batch["eps"] - batch["x0"]).square().mean().item(), rel=1e-5)  # a new twin says zero


def test_it_learns(stage):
    batch = {name: value[:8] for name, value in stage.batch(0).items()}
    module = TeacherStage("tiny", 0).module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss, _ = module(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_it_saves_can_teach(stage, tmp_path):
    stage.save(tmp_path)
    teacher, _ = load_teacher("tiny", tmp_path / "teacher")
    again = TeacherStage("tiny", 1)
    again.load(tmp_path)
    for name, tensor in again.module.transformer.state_dict().items():
        assert torch.equal(tensor, teacher.transformer.state_dict()[name]), name


def test_only_the_twin_is_trained():
    with pytest.raises(UserError, match="scale paper trains no teacher: it takes stabilityai/stable-diffusion-3.5-large"):
        TeacherStage("paper", 0)
