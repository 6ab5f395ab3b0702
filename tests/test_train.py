"""The loop: exact resume after kill -9, budgets, EMA, refusals, a NaN."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn


from snapgen_core.errors import UserError
from snapgen_core.train import Ema, TrainSettings, card, history, ship, step_generator, train
from snapgen_core.train.checkpoints import checkpoints


class Line(nn.Module):
    """Fits y = 3x - 1 with a small network; `poison` makes its loss NaN from that step on."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, y, poison):
        loss = (self.net(x) - y).square().mean() + poison.sum()
        return loss, {"twice": 2 * loss.detach()}


class LineStage:
    name, scale, options = "line", "tiny", {}

    def __init__(self, seed=0, poison_at=10**9, pause=0.0, **settings):
        torch.manual_seed(seed)
        self.seed, self.poison_at, self.pause, self.module = seed, poison_at, pause, Line()
        self.settings = TrainSettings(**{"batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 5, "steps": 30, **settings})

    def prepare(self):
        self.prepared = True

    def batch(self, step, rank=0, world=1):
        time.sleep(self.pause)
        x = torch.randn(16, 1, generator=step_generator(self.seed, step, rank))
        return {"x": x, "y": 3 * x - 1, "poison": torch.tensor([math.nan if step >= self.poison_at else 0.0])}

    def score(self):
        with torch.no_grad():
            return {"mse": self.module(**self.batch(10**6))[0].item()}

    def save(self, root):
        folder = root / "line"
        folder.mkdir(parents=True)
        save_file(self.module.state_dict(), folder / "model.safetensors")
        return [folder]

    def load(self, root):
        self.loaded = True
        path = root / "line" / "model.safetensors"
        if not path.exists():
            raise UserError(f"cannot load {path}")
        self.module.load_state_dict(load_file(path))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An empty folder in place of the shipped checkpoints."""
    folder = tmp_path / "home" / "data" / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path / "home"))
    return folder


def test_trains_logs_and_scores(tmp_path):
    stage = LineStage(steps=300, ema_decay=0.9)
    path = train(stage, tmp_path, progress=False)
    assert path == tmp_path / "model.safetensors"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 301))
    assert all(line["twice"] == pytest.approx(2 * line["loss"]) for line in log)
    result = json.loads((tmp_path / "result.json").read_text())
    assert stage.prepared and load_file(tmp_path / "weights" / "line" / "model.safetensors").keys() == load_file(path).keys()
    assert result["steps"] == 300 and result["samples"] == 4800 and result["scores"]["mse"] < 0.1 * log[0]["loss"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_compiled_training_is_the_same_but_for_rounding(tmp_path):
    """And goes on with a run that was not compiled."""
    train(LineStage(), tmp_path / "plain", steps=6, progress=False)
    train(LineStage(), tmp_path / "compiled", steps=2, progress=False)
    train(LineStage(), tmp_path / "compiled", steps=6, progress=False, compile=True)
    # The losses, for Adam makes whole steps of the first bias's gradient, which batch norm leaves nothing but rounding.
    plain, compiled = ([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4) and len(plain) == 6


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install it, or leave out --compile"):
        train(LineStage(), tmp_path / "run", steps=1, progress=False, compile=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("halt", [1, 13, 29])
def test_stop_and_resume_equals_one_run(tmp_path, halt):
    whole = train(LineStage(), tmp_path / "whole", progress=False)
    train(LineStage(), tmp_path / "parts", steps=halt, progress=False)
    parts = train(LineStage(), tmp_path / "parts", progress=False)
    assert whole.read_bytes() == parts.read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


STUDENT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_train import LatentStage
from snapgen_core.train import train
torch.set_num_threads(1)
train(LatentStage(), Path(sys.argv[1]), steps=200, save_every=0.3, progress=False)
"""


class LatentStage:
    """The real student, very narrow, on random latents: what `snapgen train base` trains, without its caches."""

    name, scale, seed, options = "latent", "tiny", 0, {}

    def __init__(self):
        from snapgen_core.stages.base import BaseTraining
        from snapgen_core.unet import SnapGenUNet

        torch.manual_seed(0)
        config = {**SnapGenUNet.from_preset("tiny").config, "channels": (32, 64)}
        unet = SnapGenUNet.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        self.module = BaseTraining(unet).to(memory_format=torch.channels_last)
        self.settings = TrainSettings(batch_size=2, learning_rate=1e-3)

    def prepare(self):
        pass

    def batch(self, step, rank=0, world=1):
        g = step_generator(self.seed, step, rank)
        x0, eps = torch.randn(2, 2, 16, 8, 8, generator=g)
        return {"x0": x0, "eps": eps, "sigma": torch.rand(2, generator=g), "context": torch.randn(2, 8, 384, generator=g)}

    def score(self):
        return {}

    def save(self, root):
        return []


@pytest.mark.parametrize("kill_after_step", [37, 111])
def test_kill_minus_9_and_resume_is_bit_identical(tmp_path, kill_after_step):
    def start(run_dir):
        return subprocess.Popen([sys.executable, "-c", STUDENT, str(run_dir), os.path.dirname(__file__)])

    log = tmp_path / "killed" / "log.jsonl"
    process = start(tmp_path / "killed")
    while not log.exists() or len(log.read_text().splitlines()) < kill_after_step:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert start(tmp_path / "killed").wait() == 0
    whole = tmp_path.parent / "uninterrupted"
    if not whole.exists():
        assert start(whole).wait() == 0
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_without_a_score_there_is_none(tmp_path):
    stage = LineStage(steps=2)
    stage.score = None  # calling it would fail
    train(stage, tmp_path, progress=False, score=False)
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == {}


def test_a_time_budget_ends_with_usable_weights(tmp_path):
    path = train(LineStage(pause=0.01), tmp_path, minutes=0.01, progress=False)
    stage = LineStage(seed=1)
    stage.module.load_state_dict(load_file(path))
    assert 0 < json.loads((tmp_path / "result.json").read_text())["steps"] < 1000


def newest(run_dir):
    """(tensors, facts) of the newest checkpoint."""
    folder = checkpoints(run_dir)[-1]
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_train import LineStage
from snapgen_core.train import train
train(LineStage(pause=0.01), Path(sys.argv[1]), minutes=0.02, progress=False)
"""


def test_two_processes_train_as_one_and_stop_together(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, tmp_path / "two.py", tmp_path / "run", os.path.dirname(__file__)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == len(steps)
    assert newest(tmp_path / "run")[1]["identity"]["world"] == 2


def test_termination_keeps_a_checkpoint(tmp_path):
    stage = LineStage(steps=10**6)
    draw = stage.batch

    def batch(step, rank=0, world=1):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(step, rank, world)

    stage.batch = batch
    with pytest.raises(KeyboardInterrupt, match="after step 13"):
        train(stage, tmp_path, progress=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000013"]


class Players(nn.Module):
    """Two weights that are trained in turns: one after the loss of even steps, the other after that of odd ones."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x, y, turn):
        made = self.one(x)
        loss = (made - y).square().mean() if turn.item() == 0 else (self.other(x) - made.detach()).abs().mean()
        return loss, {}


class PlayerStage(LineStage):
    name = "players"

    def __init__(self, seed=0, **settings):
        super().__init__(seed, rates=(("other.", 3e-3),), clip_norm=None, **settings)
        self.module = Players()

    def batch(self, step, rank=0, world=1):
        return {key: value for key, value in super().batch(step, rank, world).items() if key != "poison"} | {"turn": torch.tensor(step % 2)}

    def score(self):
        return {}


def test_turns_and_rates_are_those_of_two_optimisers(tmp_path):
    """By hand with two AdamWs; and stopped at an odd step and resumed."""
    stage = PlayerStage(ema_decay=0.0, warmup_steps=1)
    hand = Players()
    hand.load_state_dict(stage.module.state_dict())
    optimizers = [torch.optim.AdamW(p.parameters(), lr=rate, weight_decay=0.01) for p, rate in ((hand.one, 1e-2), (hand.other, 3e-3))]
    for step in range(30):
        loss, _ = hand(**stage.batch(step))
        optimizers[step % 2].zero_grad()
        loss.backward()
        optimizers[step % 2].step()
    for steps in (13, 30):
        again = PlayerStage(ema_decay=0.0, warmup_steps=1)
        train(again, tmp_path, steps=steps, progress=False)
    for name, tensor in hand.state_dict().items():
        assert torch.allclose(again.module.state_dict()[name], tensor, rtol=1e-5), name


def test_the_rate_warms_up_and_cools_down(tmp_path):
    """By hand; and stopped while it cools, and resumed."""
    stage = LineStage(ema_decay=0.0, warmup_steps=4, cooldown=0.5, clip_norm=None)
    hand = copy.deepcopy(stage.module)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 4 if step < 4 else 1.0 if step < 10 else (20 - step) / 10)
        optimizer.zero_grad()
        hand(**stage.batch(step))[0].backward()
        optimizer.step()
    train(stage, tmp_path / "whole", steps=20, progress=False)
    for name, tensor in hand.state_dict().items():
        assert torch.allclose(stage.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-7), name
    stopped = LineStage(ema_decay=0.0, warmup_steps=4, cooldown=0.5, clip_norm=None)
    draw = stopped.batch
    stopped.batch = lambda step, *place: (step == 14 and os.kill(os.getpid(), signal.SIGTERM)) or draw(step, *place)
    with pytest.raises(KeyboardInterrupt, match="after step 15"):
        train(stopped, tmp_path / "stopped", steps=20, progress=False)
    again = LineStage(ema_decay=0.0, warmup_steps=4, cooldown=0.5, clip_norm=None)
    train(again, tmp_path / "stopped", steps=20, progress=False)
    assert all(torch.equal(tensor, again.module.state_dict()[name]) for name, tensor in stage.module.state_dict().items())
    assert [TrainSettings(16, 1.0, cooldown=0.5, warmup_steps=1).share_of_rate(step, 10**9) for step in (0, 10**6)] == [1, 1]


def test_a_run_by_the_clock_does_not_cool_down_and_its_command_says_so(tmp_path):
    stage = LineStage(cooldown=0.5, pause=0.01)
    train(stage, tmp_path, minutes=0.01, progress=False)
    command, minutes = json.loads((tmp_path / "result.json").read_text())["command"].rsplit(maxsplit=1)
    assert command == "snapgen train line --scale tiny --seed 0 --minutes" and float(minutes) >= 0.01  # the least that the command takes


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(UserError, match="a batch of 16 cannot be shared by 3 processes: give --batch a multiple of 3"):
        train(LineStage(), tmp_path, steps=2, progress=False)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    train(LineStage(), tmp_path, steps=10, progress=False)
    with pytest.raises(UserError, match="not finite at step 15: loss nan, twice nan; training stopped"):
        train(LineStage(poison_at=14), tmp_path, progress=False)
    tensors, facts = newest(tmp_path)
    assert facts["step"] == 10 and all(t.isfinite().all() for t in tensors.values())


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path):
    class Root(Line):  # sqrt(0): the loss is 0, its slope infinite
        def forward(self, x, y, poison):
            return sum(p.flatten()[0] * 0 for p in self.parameters()).abs().sqrt(), {}

    stage = LineStage()
    stage.module = Root()
    before = {name: tensor.clone() for name, tensor in stage.module.state_dict().items()}
    with pytest.raises(UserError, match="step 1: grad_norm nan"):
        train(stage, tmp_path, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.module.state_dict().items())
    assert checkpoints(tmp_path) == []


def test_data_is_made_before_the_clock_starts(tmp_path):
    stage = LineStage(pause=0.01)
    stage.prepare = lambda: time.sleep(1.2)
    train(stage, tmp_path, minutes=0.01, progress=False)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] > 5


def test_a_second_signal_does_not_wait(tmp_path):
    stage = LineStage()
    stage.batch = lambda *args: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        train(stage, tmp_path, progress=False)


def test_another_architecture_in_the_folder_is_refused(tmp_path):
    train(LineStage(), tmp_path, steps=2, progress=False)
    stage = LineStage()
    stage.module = nn.Linear(2, 2)
    with pytest.raises(UserError, match="run of another model"):
        train(stage, tmp_path, progress=False)


def test_another_runs_folder_is_refused(tmp_path):
    train(LineStage(), tmp_path, steps=2, progress=False)
    with pytest.raises(UserError, match="holds a run with seed 0, not 1"):
        train(LineStage(seed=1), tmp_path, progress=False)


def test_damaged_checkpoint_is_one_clear_error(tmp_path):
    train(LineStage(), tmp_path, steps=2, progress=False)
    state = checkpoints(tmp_path)[-1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        train(LineStage(), tmp_path, progress=False)


def test_ema_matches_the_recursion_by_hand():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema, expected = Ema(module, decay=0.9), 1.0
    for step in range(1, 200):
        nn.init.constant_(module.weight, float(step))
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.state["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_shipping_replaces_the_folder_and_writes_a_card(tmp_path, shipped):
    stage = LineStage(steps=3)
    train(stage, tmp_path / "run", progress=False)
    stale = shipped / "line"
    stale.mkdir()
    (stale / "old").touch()
    assert ship(tmp_path / "run") == [stale]
    assert {path.name for path in stale.iterdir()} == {"CARD.md", "model.safetensors", "training.json"} and list(stale.parent.iterdir()) == [stale]
    text = (stale / "CARD.md").read_text()
    assert "snapgen train line --scale tiny --seed 0 --steps 3" in text and "| mse |" in text


def test_warm_start_begins_with_the_shipped_weights_and_says_so(tmp_path, shipped):
    train(LineStage(steps=200), tmp_path / "first", progress=False)
    ship(tmp_path / "first")
    train(LineStage(seed=1), tmp_path / "cold", steps=1, progress=False)
    train(LineStage(seed=1), tmp_path / "warm", steps=1, progress=False, warm_start=True)
    cold, warm = (json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[0]) for run in ("cold", "warm"))
    assert warm["loss"] < 0.2 * cold["loss"]
    resumed = LineStage(seed=1)
    train(resumed, tmp_path / "warm", steps=3, progress=False)  # the origin is remembered, and what `load` freezes
    assert resumed.loaded
    result = json.loads((tmp_path / "warm" / "result.json").read_text())
    assert result["command"].endswith("--steps 3 --warm-start") and result["origin"]["steps"] == 200
    curve = history(result)
    assert len(result["losses"]) == 3 and len(result["origin"]["losses"]) == 20  # 3 steps after 200
    assert [samples for samples, _ in curve[:2] + curve[-3:]] == [80, 240, 3208, 3224, 3240]
    log = [json.loads(line)["loss"] for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert curve[1][1] == pytest.approx(sum(log[10:20]) / 10, abs=1e-5)
    assert "| before that | `snapgen train line --scale tiny --seed 0 --steps 200`" in card("line", result)


def test_warm_start_needs_shipped_weights(tmp_path, shipped):
    with pytest.raises(UserError, match="cannot load"):
        train(LineStage(), tmp_path / "run", warm_start=True, progress=False)


def test_old_checkpoints_are_dropped(tmp_path):
    train(LineStage(), tmp_path, save_every=0.0, progress=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000029", "step-00000030"]


def test_step_generators_differ():
    draws = {torch.randn(1, generator=step_generator(s, i, r)).item() for s in range(4) for i in range(20) for r in range(4)}
    assert len(draws) == 4 * 20 * 4
