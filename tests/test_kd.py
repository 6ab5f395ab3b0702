"""Stage `kd`: where each loss reaches, what the teacher is asked, answers kept on disk, resume with the projector, what a step
costs (`bench_kd`)."""

import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from snapgen_core import bench_kd, flow
from snapgen_core.cli import main
from snapgen_core.distill import Projector, feature_loss, output_loss, scaled
from snapgen_core.errors import UserError
from snapgen_core.latents import load_autoencoder
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
from snapgen_core.scales import SCALES
from snapgen_core.stages import build_stage, kd
from snapgen_core.stages.kd import KdStage, KdTraining, parse_weights
from snapgen_core.teachers import save_reference
from snapgen_core.text import fuse, load_text_encoders
from snapgen_core.train import train
from snapgen_core.weights import save_half
from few_scenes import CAPTIONS, FewScenes


@pytest.fixture(scope="module")
def few():
    return FewScenes(load_text_encoders(SCALES["tiny"]))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_half(SD3Transformer2DModel(**SCALES["tiny"].teacher | {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 64}), folder)
    save_reference(load_autoencoder("tiny"), folder)
    return folder


@pytest.fixture
def stage(few, teacher_folder, tmp_path, monkeypatch):
    """A stage of batches of four, with any options; its answers are kept in a folder of the test."""
    monkeypatch.setattr(kd, "cache_dir", lambda scale: tmp_path / "cache")
    monkeypatch.setattr(kd, "evaluate_unet", lambda *args, **settings: {"overall": 0.5})

    def build(seed=0, **options):
        made = KdStage("tiny", seed, **({} if options.get("constant") == "0,0" else {"teacher": teacher_folder}) | options)
        made.data = few
        object.__setattr__(made.settings, "batch_size", 4)
        return made

    return build


def training(weights=None):
    torch.manual_seed(0)
    return KdTraining(load_unet(checkpoint_dir("tiny") / "base"), Projector(192, 24, (8, 8)), 3.0, weights)


def random_batch(count=4):
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 0.75, 0.95])[:count]
    return {"x0": normal(count, 16, 8, 8), "eps": normal(count, 16, 8, 8), "sigma": sigma, "context": normal(count, 48, 384), "velocity": normal(count, 16, 8, 8), "features": normal(count, 24, 8, 8)}


# ------------------------------------------------------------------------------------------------- the losses

LATER = ("unet.up_blocks.0.upsample", "unet.up_blocks.1", "unet.norm_out", "unet.conv_out")  # what lies behind the features


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        ("task", lambda name: name.startswith("unet.")),
        ("output", lambda name: name.startswith("unet.")),
        ("features", lambda name: not name.startswith(LATER)),
    ],
)
def test_each_loss_reaches_exactly_its_parameters(loss, reached):
    module, batch = training(), random_batch()
    for name in ("velocity", "features"):
        batch[name].requires_grad_()
    module.losses(**batch)[loss].sum().backward()
    got = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == {name for name, _ in module.named_parameters() if reached(name)}
    assert batch["velocity"].grad is None and batch["features"].grad is None


def test_losses_by_hand():
    module, batch = training(), random_batch()
    inputs = (flow.interpolate(batch["x0"], batch["eps"], batch["sigma"]), 1000 * batch["sigma"], batch["context"])
    seen = []
    handle = module.unet.up_blocks[0].upsample.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    v = module.unet(*inputs).sample
    handle.remove()
    losses = module.losses(**batch)
    assert torch.allclose(losses["task"], flow.flow_matching_loss(v, batch["x0"], batch["eps"]))
    assert torch.allclose(losses["output"], output_loss(batch["velocity"], v))
    assert seen[0].shape == (4, 192, 4, 4) and torch.allclose(losses["features"], feature_loss(batch["features"], module.projector(seen[0])))


def test_scaling_goes_by_the_timestep_before_the_shift():
    module, batch = training(), random_batch()
    u = torch.tensor([0.1 / 2.8, 0.25, 0.5, 0.95 / 1.1])  # sigma / (3 - 2 sigma)
    assert torch.allclose(flow.unshift(batch["sigma"]), u) and torch.allclose(flow.time_shift(u), batch["sigma"])
    losses = module.losses(**batch)
    expected = scaled(losses["task"], losses["output"], u) + scaled(losses["task"], losses["features"], u)
    loss, figures = module(**batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert figures == {name: pytest.approx(value.mean().item()) for name, value in losses.items()}


def test_eq_6_in_its_place():
    batch = random_batch()
    module = training((0.5, 0.1))
    losses = module.losses(**batch)
    assert module(**batch)[0].item() == pytest.approx((losses["task"] + 0.5 * losses["output"] + 0.1 * losses["features"]).mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- the batches


def test_batches_are_a_pure_function_of_seed_and_step(stage):
    a, b = stage(), stage()
    assert all(torch.equal(a.batch(3)[name], value) for name, value in b.batch(3).items())
    assert not torch.equal(a.batch(3)["velocity"], a.batch(4)["velocity"]) and not torch.equal(a.batch(3)["eps"], stage(seed=1).batch(3)["eps"])


def test_student_and_teacher_read_the_whole_prompt_or_nothing(stage, few):
    made, asked = stage(), []
    text = made.text
    made.text = lambda prompts: asked.extend(prompts) or text(prompts)
    contexts = torch.cat([made.batch(step)["context"] for step in range(60)])
    for context, prompt in zip(contexts, asked, strict=True):
        assert torch.equal(context, fuse(*few.gather([prompt]))[0]) if prompt else not context.any()
    unread = asked.count("")
    assert abs(unread / 240 - 0.1) < 4 * (0.1 * 0.9 / 240) ** 0.5 and len(set(asked)) == 1 + len(CAPTIONS)


def test_answers_are_the_teachers_at_the_students_point(stage):
    made = stage()
    batch = made.batch(0)
    _, whole = made.drawn(0, 4)
    x = torch.stack([(1 - s) * x0 + s * eps for s, x0, eps in zip(batch["sigma"], batch["x0"], batch["eps"])])
    velocity, features = made.teacher(x, 1000 * batch["sigma"], *made.text(whole))
    assert torch.allclose(batch["velocity"], velocity, atol=1e-5) and torch.allclose(batch["features"], features, atol=1e-5)


def test_stored_answers_are_asked_for_once_and_go_round(stage, monkeypatch):
    live, made = stage(), stage(stored=2)
    first = [made.batch(step) for step in range(2)]
    for step in range(2):
        for name, value in live.batch(step).items():
            assert torch.allclose(first[step][name].float(), value, atol=5e-3), name
    monkeypatch.setattr(KdStage, "answers", None)  # would be called, and fail
    again = [stage(stored=2).batch(step) for step in (2, 3)]
    assert all(torch.equal(again[i][name], first[i][name]) for i in range(2) for name in first[i])


def test_damaged_answers_are_asked_for_again(stage):
    made = stage(stored=1)
    good = made.batch(0)
    path = next(made.folder.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(made.batch(0)["features"], good["features"]) and load_file(path).keys() == {"velocity", "features"}


def test_answers_of_another_teacher_seed_or_captions_are_never_mixed_up(stage, teacher_folder, tmp_path):
    torch.manual_seed(1)
    save_half(SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(teacher_folder)), tmp_path / "other")
    save_reference(load_autoencoder("tiny"), tmp_path / "other")
    hard_of_hearing = stage(stored=2)
    text = hard_of_hearing.text
    hard_of_hearing.text = lambda prompts: tuple(0.5 * part for part in text(prompts))
    seldom_wrong = stage(stored=2, mislabel=0.01)  # its first batch may well be the same
    others = (stage(stored=2, seed=1), stage(stored=2, teacher=tmp_path / "other"), hard_of_hearing, seldom_wrong)
    folders = {stage(stored=2).folder, *(other.folder for other in others)}
    assert len(folders) == 5 and stage(stored=5).folder == stage(stored=2, constant="1,0").folder == stage(stored=2).folder
    assert stage(stored=2, constant="1,0").batch(0).keys() == stage(stored=2).batch(0).keys() - {"features"}


# ------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("constant", [None, "1,0", "0,0"])
def test_stop_and_resume_equals_one_run(stage, tmp_path, constant):
    """Projector and its moments included."""
    def made():
        new = stage(constant=constant, **{} if constant == "0,0" else {"stored": 2})
        object.__setattr__(new.settings, "warmup_steps", 1)  # so that the rate falls in the last step, after the stop
        return new

    whole = train(made(), tmp_path / "whole", steps=3, progress=False)
    stopped = made()
    draw = stopped.batch
    stopped.batch = lambda step, *place: (step == 1 and os.kill(os.getpid(), signal.SIGTERM)) or draw(step, *place)
    with pytest.raises(KeyboardInterrupt, match="after step 2"):
        train(stopped, tmp_path / "halves", steps=3, progress=False)
    halves = train(made(), tmp_path / "halves", steps=3, progress=False)
    a, b = load_file(whole), load_file(halves)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("projector.") for name in a) == (constant is None)
    held = load_file(next((tmp_path / "whole" / "checkpoints").glob("*3/state.safetensors")))
    assert ("optimizer.projector.conv2.weight.exp_avg" in held) == (constant is None)


def test_all_rows_of_the_table_see_the_same_samples(stage):
    rows = [stage(constant="0,0"), stage(constant="1,0", stored=5), stage(constant="1,0.03", stored=5), stage(stored=5)]
    for step in (0, 3):
        first, *others = (row.batch(step) for row in rows)
        assert all(torch.equal(other[name], value) for other in others for name, value in first.items())


def test_answers_that_do_not_fit_on_the_disk_are_refused(stage, monkeypatch):
    made = stage(stored=10**9)
    monkeypatch.setattr(kd, "load_detector", None)  # before anything is loaded
    with pytest.raises(UserError, match=r"the teacher's answers to 1000000000 batches take up to [\d,.]+ GiB, and .* GiB left: store fewer"):
        made.prepare()


def test_a_projector_of_another_training_is_refused(stage, tmp_path):
    stage().save(tmp_path)
    for name in ("kd", "kd_projector"):
        card = {"command": name, "commit": "", "steps": 1, "samples": 4, "minutes": 0.0, "device": "cpu"}
        (tmp_path / name / "training.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="another training than the student"):
        stage().load(tmp_path)


def test_mislabelled_scenes_carry_captions_of_other_scenes():
    captions = [f"a picture of {number}" for number in range(1000)]
    mixed = kd.mislabelled(captions, 0.3)
    assert sum(a != b for a, b in zip(captions, mixed)) == 300 and sorted(mixed) == sorted(captions)
    assert mixed == kd.mislabelled(captions, 0.3) and kd.mislabelled(captions, 0.0) == captions


def test_training_reads_the_wrong_captions(monkeypatch):
    monkeypatch.setattr(kd, "TrainingSet", lambda scale, seed: SimpleNamespace(scenes=SimpleNamespace(captions=list("abcd"))))
    for share in (None, 1.0):
        made = build_stage("kd", "tiny", constant="0,0", mislabel=share)
        assert sum(a != b for a, b in zip(made.data.scenes.captions, "abcd")) == (4 if share else 0)
        assert made.options.get("mislabel") == ("1" if share else None)


def test_another_student_to_begin_with(stage, tmp_path):
    made = stage()
    with torch.no_grad():
        for parameter in made.module.unet.parameters():
            parameter.zero_()
    made.save(tmp_path)
    again = stage(student=tmp_path / "kd")
    assert not any(parameter.any() for parameter in again.module.unet.parameters())
    assert again.options["student"] == str(tmp_path / "kd")
    with pytest.raises(UserError, match="no student in /nowhere"):
        stage(student="/nowhere")


def test_without_a_teacher_it_is_the_task_alone(stage, monkeypatch):
    monkeypatch.setattr(kd, "load_teacher", None)
    made = stage(constant="0,0")
    batch = made.batch(0)
    assert set(batch) == {"x0", "eps", "sigma", "context"} and made.module.projector is None
    loss, figures = made.module(**batch)
    assert loss.item() == pytest.approx(figures["task"].item())


def test_a_student_learns_its_teachers_answers(stage):
    """Five steps on one batch bring output and features nearer."""
    made = stage()
    batch = made.batch(0)
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=1e-3)
    before = made.module(**batch)[1]
    for _ in range(5):
        made.module(**batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = made.module(**batch)[1]
    assert after["output"] < before["output"] and after["features"] < before["features"]


def test_it_begins_with_the_base_student_and_comes_back_whole(stage, tmp_path):
    made = stage()
    base = load_unet(checkpoint_dir("tiny") / "base").state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in made.module.unet.state_dict().items())
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.add_(0.1)
    assert [folder.name for folder in made.save(tmp_path)] == ["kd", "kd_projector"]
    again = stage(seed=3)
    again.load(tmp_path)
    for name, tensor in again.module.state_dict().items():
        assert torch.allclose(tensor, made.module.state_dict()[name], atol=2e-3), name


def test_another_run_in_its_folder_is_refused(stage, tmp_path):
    train(stage(), tmp_path / "run", steps=1, progress=False)
    with pytest.raises(UserError, match="constant left out, not 1,0"):
        train(stage(constant="1,0"), tmp_path / "run", steps=2, progress=False)


def test_without_feature_distillation_no_features_are_asked_for(stage):
    assert "features" not in stage(constant="1,0").batch(0) and "features" in stage(constant="1,0.1").batch(0)


def test_a_projector_of_another_teacher_is_refused(stage, tmp_path):
    stage().save(tmp_path)
    save_half(Projector(192, 24, (8, 8)), tmp_path / "kd_projector")
    with pytest.raises(UserError, match="another teacher's features"):
        stage().load(tmp_path)


def test_16_bits_of_the_teacher_beside_32_of_the_student():
    """Answers as SD3.5 gives them, and training under autocast as on a GPU."""
    module, batch = training(), random_batch()
    plain = module(**batch)[0]
    losses, t = {name: value.detach() for name, value in module.losses(**batch).items()}, flow.unshift(batch["sigma"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = scaled(losses["task"], losses["output"], t)
    assert inside.item() == pytest.approx(scaled(losses["task"], losses["output"], t).item(), rel=1e-6)
    batch |= {name: batch[name].bfloat16() for name in ("velocity", "features")}
    with torch.autocast("cpu", torch.bfloat16):
        loss, figures = module(**batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=0.02)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "-1,0", "nan,1", "1,inf", ""])
def test_weights_that_are_none(text):
    with pytest.raises(UserError, match="no weights of Eq. 6"):
        parse_weights(text)


def test_options_without_effect_are_refused(stage, teacher_folder):
    for options in ({"stored": 3}, {"t5": "no"}, {"t5": "yes"}, {"teacher": teacher_folder}):
        with pytest.raises(UserError, match="there is no teacher: leave out"):
            stage(constant="0,0", **options)
    with pytest.raises(UserError, match="the teacher of scale tiny has no T5"):
        stage(t5="no")
    assert stage(constant="0.50,2.0").options["constant"] == "0.5,2" and "t5" not in stage(t5="yes").options


def test_batch_and_rate_change_the_settings_and_tell_runs_apart():
    made, plain = build_stage("base", "tiny", 0, 128, 1e-3), build_stage("base", "tiny", 0)
    assert (made.settings.batch_size, made.settings.learning_rate) == (128, 1e-3) and made.options == {"batch": "128", "rate": "0.001"}
    assert plain.options == {} and (plain.settings.batch_size, plain.settings.learning_rate) == (64, 8e-4)
    more = build_stage("teacher", "tiny", 0, scenes=70_000)
    assert more.options == {"scenes": "70000"} and more.scenes == 70_000
    with pytest.raises(UserError, match="stage base takes no --scenes, only teacher does"):
        build_stage("base", "tiny", scenes=5)


def test_options_of_other_stages_are_refused():
    assert parse_weights("0.5,2") == (0.5, 2.0)
    with pytest.raises(UserError, match="stage base takes no --constant, only kd does"):
        build_stage("base", "tiny", constant="0,0")
    with pytest.raises(UserError, match="no teacher in /nowhere"):
        build_stage("kd", "tiny", teacher="/nowhere")


# ------------------------------------------------------------------------------------------------- what it costs


def test_steps_are_timed_in_turns(few, teacher_folder, stage, monkeypatch):
    monkeypatch.setattr(bench_kd, "KdStage", lambda scale, seed, **options: stage(seed, **options))
    monkeypatch.setattr(kd, "TrainingSet", lambda scale, seed: few)
    asked = []
    answers = KdStage.answers
    monkeypatch.setattr(KdStage, "answers", lambda stage, *given: asked.append(stage.stored) or answers(stage, *given))
    times = bench_kd.time_steps("tiny", 2, teacher_folder)
    assert asked.count(1) == 1 and asked.count(None) == 3  # stored: once, before the clock starts; live: every time
    assert times["plain"]["ratio"] == 1 and all(len(times[mode]["seconds"]) == 2 and times[mode]["ratio"] > 0 for mode in bench_kd.MODES)
    assert times["batch_size"] == 4


def test_attention_keeps_no_matrix_of_scores():
    class Attend(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(2 * x, 3 * x, 4 * x)

    with torch.device("meta"):
        x = torch.empty(1, 2, 100, 8, requires_grad=True)
    assert bench_kd.saved_bytes(Attend(), x=x) == 4 * 4 * x.numel()  # queries, keys, values and the output


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_are_counted_once(device):
    """Two layers keep their inputs and the ReLU between them its output, which is the second layer's input."""
    with torch.device(device):
        network, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.empty(3, 4)
    assert bench_kd.saved_bytes(network, input=x) == 4 * (3 * 4 + 3 * 8)


def test_costs_at_the_papers_size():
    """SD3.5-Large has 8.06 B parameters; a transformer's MACs are at least its weights' for each token."""
    costs = bench_kd.paper_costs()
    # Every token passes one of a block's two halves, and 36 of a block's 108 matrices make modulations, once a picture.
    assert 0.6 < costs["teacher_macs"] / (4096 * costs["teacher_parameters"] / 3) < 2.5
    assert costs["teacher_parameters"] == pytest.approx(8.06e9, rel=0.005) and costs["student_parameters"] == pytest.approx(379e6, rel=0.01)
    assert costs["answer_bytes"] == 2 * (16 * 128 * 128 + 2432 * 64 * 64)
    assert 1 < costs["kd_activation_bytes"] / costs["task_activation_bytes"] < 1.05


def test_fresh_steps_are_taken_without_and_with_a_teacher():
    """At `tiny` and on a CPU, where bytes are not measured: the same function takes the paper's steps on a GPU."""
    config = SCALES["tiny"].teacher
    found = bench_kd.paper_steps(2, 2, "tiny", config, text_tokens=5, teacher_tokens=7)
    assert found["batch_size"] == 2 and found["plain"]["ratio"] == 1 and found["live"]["ratio"] > 0
    assert all(len(found[mode]["seconds"]) == 2 and found[mode]["peak_bytes"] is None for mode in ("plain", "live"))
    assert torch.get_default_dtype() == torch.float32


def test_what_a_step_holds_whatever_the_batch():
    costs = {"student_parameters": 10, "projector_parameters": 3, "teacher_parameters": 100}
    assert bench_kd.state_bytes(costs, False) == 160 and bench_kd.state_bytes(costs, True) == 160 + 48 + 200


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capfd):
    steps = {mode: {"seconds": [0.5], "median": 0.5, "ratio": ratio} for mode, ratio in (("plain", 1.0), ("stored", 1.2), ("live", 1.6))} | {"batch_size": 64}
    monkeypatch.setattr(bench_kd, "time_steps", lambda scale, runs, teacher: steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kd", "--runs", "7", "--json", str(tmp_path / "b.json")]) == 0
    out, written = capfd.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "the teacher asked" in out and "1.60" in out and "9.0 times the MACs" in out
    assert written["steps"] == steps and written["runs"] == 7 and written["paper_measured"] is None and written["paper"]["step_macs_ratio"] == pytest.approx(8.96, abs=0.05)
    assert main(["bench", "kd", "--only", "live"]) == 2 and "takes no --only" in capfd.readouterr().err


def test_a_gpu_takes_the_papers_step(monkeypatch, tmp_path, capfd):
    steps = {mode: {"seconds": [0.5], "median": 0.5, "ratio": 1.0} for mode in bench_kd.MODES} | {"batch_size": 64}
    measured = {mode: {"median": 0.25, "ratio": ratio, "peak_bytes": 3 * 2**30, "sample_bytes": 2**30} for mode, ratio in (("plain", 1.0), ("live", 2.5))} | {"batch_size": 4}
    monkeypatch.setattr(bench_kd, "time_steps", lambda scale, runs, teacher: steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench_kd, "paper_steps", lambda runs: measured)
    assert main(["bench", "kd", "--json", str(tmp_path / "b.json")]) == 0
    out = capfd.readouterr().out
    assert "the teacher asked: 0.250 s for 4 samples, 2.5 times; at most 3.0 GiB (expected 36.6), 1.0 a sample" in out
    assert json.loads((tmp_path / "b.json").read_text())["paper_measured"] == measured

    def full(runs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_kd, "paper_steps", full)
    assert main(["bench", "kd"]) == 0 and "no room for it" in capfd.readouterr().err
