"""`snapgen bench`: what it counts, measures, skips and writes."""

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from snapgen_core import bench
from snapgen_core.cli import main
from snapgen_core.peers import BENCHMARKS, CHAIN, UNETS, Contender
from snapgen_core.profile import count_macs, count_parameters

SMALL = Contender("small", lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), lambda: {"input": torch.randn(1, 4, 16, 16)})
CPU = torch.device("cpu")


def test_peers_are_the_published_ones():
    """Parameters in millions and GMACs at a 1024-pixel picture, from the models' own papers and cards."""
    known = {"ours": 379, "sdxl": 2567, "sd15": 860, "pixart": 611, "sana": 1604, "sd3": 2028, "dreamlite": 384}
    counted = {name: bench.count(UNETS[name]) for name in known}
    for name, millions in known.items():
        assert counted[name][0] / 1e6 == pytest.approx(millions, rel=0.01), name
    assert counted["dreamlite"][1] / 1e9 == pytest.approx(668, rel=0.01)
    assert counted["ours"][1] < counted["dreamlite"][1] < counted["sana"][1] < counted["sd15"][1] < counted["sd3"][1]


def test_chain_has_the_steps_of_fig_3():
    assert list(CHAIN) == ["a", "b", "c0", "c", "d", "e", "f", "g"]
    parameters = [bench.count(CHAIN[letter])[0] for letter in "abcde"]
    assert parameters == sorted(parameters, reverse=True)


def test_random_weights_keep_the_model_as_it_is():
    def build():
        layer = nn.Linear(3, 5)
        layer.register_buffer("table", torch.arange(4.0))
        return nn.Sequential(layer, nn.LayerNorm(5))

    model = bench.with_random_weights(build, CPU, torch.float32)
    assert count_parameters(model) == count_parameters(build()) and not model.training
    weights = torch.cat([p.flatten() for p in model.parameters()])
    assert weights.abs().max() <= 0.02 and weights.std() > 0.005 and weights.unique().numel() > 10
    assert torch.equal(model[0].table, torch.arange(4.0))
    assert bench.with_random_weights(build, CPU, torch.bfloat16)[0].table.dtype == torch.bfloat16


@pytest.fixture
def small(monkeypatch):
    other = replace(SMALL, title="other", beside="ours")
    monkeypatch.setitem(BENCHMARKS, "unet", {"ours": SMALL, "other": other})


def test_measure_takes_turns_in_both_layouts(small):
    ours, other = bench.measure("unet", "ours", runs=2), bench.measure("unet", "other", runs=3)
    assert ours["layouts"]["as_built"]["beside_seconds"] == [] and ours["matmul_gflops"] > 0.1
    assert list(other["layouts"]) == ["as_built", "channels_last"]
    for times in other["layouts"].values():
        assert len(times["seconds"]) == len(times["beside_seconds"]) == 3
        assert all(0 < seconds < 5 for seconds in times["seconds"] + times["beside_seconds"])
    assert bench.count(SMALL) == (4 * 8 * 9 + 8 + 16 + 36, 16 * 16 * (4 * 8 * 9 + 32))


def test_channels_last_reaches_weights_and_inputs():
    forward = bench.Forward(SMALL, CPU, torch.float32)
    before = forward.model(**forward.inputs)
    forward.turn_to_channels_last()
    after = forward.model(**forward.inputs)
    assert after.is_contiguous(memory_format=torch.channels_last) and not before.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Conv2d(4, 8, 2, 2), nn.Conv2d(8, 8, 1)), lambda: nn.Conv2d(4, 8, 2, 2)])
def test_layouts_matter_to_networks_of_convolutions_only(build):
    forward = bench.Forward(replace(SMALL, build=build), CPU, torch.float32)
    assert len(forward.layouts) == (2 if isinstance(forward.model, nn.Sequential) else 1)


def child(returncode=0, seconds=(0.5,), beside=(), stderr=""):
    figures = {"layouts": {"as_built": {"seconds": seconds, "beside_seconds": beside}}, "matmul_gflops": 100.0, "memory_gib": 1.5}
    return SimpleNamespace(returncode=returncode, stdout="a warning\n" + json.dumps(figures) + "\n", stderr=stderr)


def test_ratios_are_of_passes_side_by_side(small, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: child(seconds=(2.0, 9.0, 3.0), beside=(1.0, 3.0, 2.0)))
    line = bench.run("unet", "other", 3)
    times = line["layouts"]["as_built"]
    assert (times["median"], times["ratio"], times["lowest"], times["highest"]) == (3.0, 2.0, 1.5, 3.0)
    macs = count_macs(SMALL.build(), **SMALL.inputs())
    assert times["gflops"] == pytest.approx(2 * macs / 3.0 / 1e9)
    assert times["share_of_peak"] == pytest.approx(times["gflops"] / 100)
    assert line["floor_seconds"] == pytest.approx(2 * macs / 100e9)


@pytest.mark.parametrize(
    ("room", "answer", "why"),
    [(1.0, None, "needs about 3 GiB of memory, 1 are free"), (64.0, child(-9), "signal 9"), (64.0, child(1, stderr="Traceback\nValueError: odd"), "ValueError: odd"), (64.0, child(1), "no reason")],
)
def test_what_does_not_run_is_skipped_and_says_why(small, monkeypatch, room, answer, why):
    monkeypatch.setattr(bench, "_room_gib", lambda device: room)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    line = bench.run("unet", "other", 1)
    assert why in line["skipped"] and "layouts" not in line


def test_the_command_prints_a_table_and_writes_json(small, monkeypatch, tmp_path, capfd):
    answers = iter([child(), child(-9)])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: next(answers))
    monkeypatch.setattr("snapgen_core.commands.bench.git_commit", lambda: "abc")
    assert main(["bench", "unet", "--json", str(tmp_path / "b.json"), "--runs", "2"]) == 0
    shown, told = capfd.readouterr()
    assert "of peak" in shown and "floor of ours" in shown and "skipped" in shown and "signal 9" in told
    written = json.loads((tmp_path / "b.json").read_text())
    assert [line["name"] for line in written["models"]] == ["ours", "other"] and written["command"].startswith("snapgen bench unet")


def test_every_line_is_compared_with_one_of_its_benchmark():
    for contenders in BENCHMARKS.values():
        alone = [name for name, contender in contenders.items() if contender.beside is None]
        assert alone == list(contenders)[:1]
        assert all(contender.beside in contenders for name, contender in contenders.items() if name not in alone)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench"], "WHAT"),
        (["bench", "everything"], "everything"),
        (["bench", "unet", "--only", "sdxxl"], "unknown model 'sdxxl': choose among ours, "),
        (["bench", "unet", "--runs", "0"], "from 1 to 1000"),
        (["bench", "unet", "--json", "there/is/no/such.json"], "does not exist"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, told, capfd):
    assert main(arguments) == 2
    shown, error = capfd.readouterr()
    assert shown == "" and told in error and error.count("\n") == 1
