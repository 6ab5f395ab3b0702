"""`snapgen bench steps`: what is timed, and what the stage costs at the paper's size."""

import json

import pytest

from snapgen_core import bench_steps
from snapgen_core.bench_kd import paper_costs
from snapgen_core.cli import main
from snapgen_core.pipeline import SnapGenPipeline


def test_both_ways_draw_as_their_stages_do_and_take_turns(monkeypatch):
    asked = []
    draw = SnapGenPipeline.__call__

    def watched(pipe, prompt, **settings):
        calls = []
        hook = pipe.unet.register_forward_hook(lambda module, inputs, outputs: calls.append(len(inputs[0])))
        pictures = draw(pipe, prompt, **settings)
        hook.remove()
        asked.append(calls)
        return pictures

    monkeypatch.setattr(SnapGenPipeline, "__call__", watched)
    times = bench_steps.time_pictures("tiny", 2, count=3)
    assert asked == [[6] * 28, [3] * 4] * 3  # network calls and their batches; the first round is not timed
    assert times["ratio"] > 1 and times["before"]["median"] > times["after"]["median"]
    for name in ("before", "after"):
        assert len(times[name]["seconds"]) == 2 and set(times[name]["parts"]) == {"text", "step", "decoder"}
        assert sum(times[name]["parts"].values()) < times[name]["median"] * 1.5


def test_costs_at_the_papers_size():
    costs = bench_steps.paper_training()
    kd = paper_costs()
    # In a round of sixteen samples twelve are on the student's own run: three each have come 0, 1, 2 and 3 steps.
    assert costs["students_turn_macs"] == (3 + 18 / 16) * kd["student_macs"] + 3 * kd["teacher_macs"] > costs["heads_turn_macs"]
    # 38 blocks keep at least the inputs of their big matrices: queries, keys, values, outputs and the MLP's 4 D, for 4096 tokens in 16 bits.
    assert costs["students_turn_seconds"] == 2 * costs["students_turn_macs"] / (0.4 * 312e12)
    least = 38 * 4096 * 2432 * 2 * 8
    assert least < costs["activation_bytes"] - kd["task_activation_bytes"] < 4 * least
    frozen = 8.06e9 + 4.76e9 + 2.61e9 + 0.82e9  # SD3.5-Large, T5, Gemma, both CLIPs
    assert costs["state_bytes"] == pytest.approx(20 * 380e6 + 2 * frozen, rel=0.01) and costs["heads_parameters"] < 1e6


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capfd):
    parts = {"text": 0.01, "step": 0.02, "decoder": 0.03}
    times = {"ratio": 12.5, "before": {"stage": "kd", "steps": 28, "guidance": 4.0, "seconds": [1.25], "median": 1.25, "parts": parts}, "after": {"stage": "distilled", "steps": 4, "guidance": 1.0, "seconds": [0.1], "median": 0.1, "parts": parts}}
    monkeypatch.setattr(bench_steps, "time_pictures", lambda scale, runs, count: times | {"count": count})
    assert main(["bench", "steps", "--runs", "7", "--json", str(tmp_path / "b.json")]) == 0
    out, written = capfd.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "12.5 times as fast" in out and "decoder 30.0 ms" in out and "the heads' turn" in out and "TMACs" in out
    assert written["pictures"] == {str(count): times | {"count": count} for count in bench_steps.COUNTS} and written["runs"] == 7 and written["paper"]["heads_turn_macs"] > 1e13
    assert main(["bench", "steps", "--only", "after"]) == 2 and "takes no --only" in capfd.readouterr().err
    assert main(["bench", "steps", "--teacher", "folder"]) == 2 and "has no teacher" in capfd.readouterr().err
