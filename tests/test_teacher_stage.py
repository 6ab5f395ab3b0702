"""Stage `teacher`: what it is shown, whom it imitates first, and what it leaves for those who load it."""

import pytest
import torch

from snapgen_core import flow
from snapgen_core.errors import UserError
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
from snapgen_core.scales import SCALES
from snapgen_core.stages.teacher import DETAIL, DROP_PROBABILITY, IMITATION, TeacherStage
from snapgen_core.teachers import load_teacher
from snapgen_core.text import fuse, load_text_encoders

CAPTIONS = ["a red car", "a dog", "two apples"]


class FewScenes:
    """In place of `TeacherData`: random latents under three captions."""

    def __init__(self):
        encoders = load_text_encoders(SCALES["tiny"])
        self.embeddings, self.parts, self.rows = self, encoders.encode_parts(CAPTIONS), encoders.pooled(CAPTIONS)

    def pick(self, count, generator):
        rows = torch.randint(len(CAPTIONS), (count,), generator=generator).tolist()
        return torch.randn(count, 16, 8, 8, generator=generator), [CAPTIONS[row] for row in rows]

    def gather(self, captions):
        return tuple(part[[CAPTIONS.index(caption) for caption in captions]] for part in self.parts)

    def pooled(self, captions):
        return self.rows[[CAPTIONS.index(caption) for caption in captions]]


@pytest.fixture(scope="module")
def stage():
    made = TeacherStage("tiny", 0)
    made.data = FewScenes()
    return made


def test_batches_are_a_pure_function_of_seed_and_step(stage):
    a, b = stage.batch(5), stage.batch(5)
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["eps"], stage.batch(6)["eps"])
    assert not torch.equal(stage.batch(5, rank=0, world=2)["eps"], stage.batch(5, rank=1, world=2)["eps"])


def test_the_text_is_dropped_whole(stage):
    """Context and pooled embeddings together, for one sample in ten; never one encoder alone."""
    batches = [stage.batch(IMITATION + step) for step in range(16)]
    context, pooled = (torch.cat([batch[name] for batch in batches]) for name in ("context", "pooled"))
    reads = context.flatten(1).any(dim=1)
    assert torch.equal(reads, pooled.any(dim=1))
    whole = fuse(*stage.data.parts)
    assert all(any(torch.equal(one, caption) for caption in whole) for one in context[reads])
    count = len(reads)
    assert abs((~reads).float().mean().item() - DROP_PROBABILITY) < 4 * (DROP_PROBABILITY * 0.9 / count) ** 0.5


def answers_of_student(batch):
    student = load_unet(checkpoint_dir("tiny") / "base")
    with torch.no_grad():
        return student(flow.interpolate(batch["x0"], batch["eps"], batch["sigma"]), 1000 * batch["sigma"], batch["context"]).sample


def test_first_the_student_is_imitated_then_the_data_decide_what_is_where(stage):
    early, late = stage.batch(IMITATION - 1), stage.batch(IMITATION)
    assert torch.allclose(early["target"], answers_of_student(early), atol=1e-4)
    noisy = late["sigma"] >= DETAIL
    assert 0.2 < noisy.float().mean() < 0.9
    assert torch.equal(late["target"][noisy], (late["eps"] - late["x0"])[noisy])
    assert torch.allclose(late["target"][~noisy], answers_of_student(late)[~noisy], atol=1e-4)


def test_a_warm_start_goes_on_with_what_is_left_of_the_imitation(stage):
    warm = TeacherStage("tiny", 0)
    warm.data, warm.before = stage.data, IMITATION - 3
    for step, imitates in ((2, True), (3, False)):
        batch = warm.batch(step)
        noisy = batch["sigma"] >= DETAIL
        assert torch.equal(batch["target"][noisy], (batch["eps"] - batch["x0"])[noisy]) != imitates


def test_the_loss_against_the_data_is_eq_2(stage):
    batch = {name: value[:4] for name, value in stage.batch(IMITATION).items()}
    batch["target"] = batch["eps"] - batch["x0"]
    loss, figures = TeacherStage("tiny", 0).module(**batch)
    assert loss.item() == pytest.approx((batch["eps"] - batch["x0"]).square().mean().item(), rel=1e-5)  # a new twin says zero
    assert figures["task"].item() == pytest.approx(loss.item(), rel=1e-5) and not figures["task"].requires_grad


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
