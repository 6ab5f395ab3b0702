"""The command line: what is wrong costs one line and exit code 2, what is odd gives a picture."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import snapgen_core
from snapgen_core import cli
from snapgen_core.cli import main
from snapgen_core.errors import UserError
from snapgen_core.paths import data_dir
from snapgen_core.pipeline import build
from snapgen_core.unet import SnapGenUNet

ROOT = Path(__file__).parents[1]
COMMANDS = ("run", "train", "generate", "evaluate", "prepare", "export", "demo", "bench", "doctor")
GOOD = ["generate", "a red car", "--steps", "1"]


def rejected(capfd, *arguments):
    """Run a command that must fail at the door; returns its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("snapgen: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Every test starts in an empty folder, so that anything left behind is seen."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    return folder


# ---------------------------------------------------------------------------
# Arguments


def run_process(*arguments):
    code = "import sys; from snapgen_core.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def test_the_command_is_declared():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["snapgen"]
    assert script == f"{main.__module__}:{main.__name__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_scale_seed_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--scale {tiny,small,paper}" in shown and "--seed" in shown and f"snapgen {command}" in shown.split("examples:")[1]


def test_help_loads_nothing_heavy():
    code = "import sys; from snapgen_core import cli; cli.build_parser(); print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout == "[]\n"


def test_choices_are_the_librarys():
    from snapgen_core.peers import BENCHMARKS
    from snapgen_core.scales import SCALE_NAMES
    from snapgen_core.stages import STAGES

    assert cli.TRAIN_STAGES == tuple(STAGES)
    assert cli.BENCHMARKS == (*BENCHMARKS, "kd", "steps", "export")
    assert all("{" + ",".join(SCALE_NAMES) + "}" in cli.build_parser()._subparsers._group_actions[0].choices[name].format_help() for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["generate"], "PROMPT"),
        (["generate", ""], "prompt is empty"),
        (["generate", " \t\n "], "prompt is empty"),
        (["generate", "bytes \udce4"], "UTF-8"),
        ([*GOOD, "--steps", "0"], "from 1 to 1000"),
        ([*GOOD, "--steps", "1001"], "from 1 to 1000"),
        ([*GOOD, "--steps", "2.5"], "whole number"),
        ([*GOOD, "--steps", "9" * 5000], "whole number"),
        ([*GOOD, "--guidance", "nan"], "from 0 to 30"),
        ([*GOOD, "--guidance", "-1"], "from 0 to 30"),
        ([*GOOD, "--guidance", "1e99"], "from 0 to 30"),
        ([*GOOD, "--num", "0"], "from 1 to 64"),
        ([*GOOD, "--num", "65"], "from 1 to 64"),
        ([*GOOD, "--seed", "-1"], "from 0 to"),
        ([*GOOD, "--seed", str(2**63)], "from 0 to"),
        ([*GOOD, "--scale", "huge"], "tiny, small, paper"),
        ([*GOOD, "--stage", "turbo"], "base"),
        ([*GOOD, "--step", "3"], "--step"),  # no guessing of shortened names
        ([*GOOD, "two\nlines \x1b[31m"], "two lines"),
        (["train", "everything"], "autoencoder"),
        (["train", "base", "--steps", "0"], "from 1"),
        (["train", "base", "--minutes", "inf"], "from 0.01"),
        (["train", "base", "--steps", "1", "--minutes", "1"], "not allowed with"),
        (["train", "base", "--scale", "huge"], "tiny, small, paper"),
        (["evaluate", "--images", "1"], "from 2"),
        (["evaluate", "--json", "figures.txt"], ".json"),
        (["evaluate", "--json", "no/figures.json"], "does not exist"),
        (["prepare", "--images", "0"], "from 1"),
        (["doctor", "--scale", "huge"], "tiny, small, paper"),
    ],
)
def test_wrong_arguments(arguments, told, capfd, empty_folder):
    line = rejected(capfd, *arguments)
    assert told in line and "\x1b" not in line and len(line) < 500
    assert os.listdir(empty_folder) == []


def test_a_real_process_ends_the_same_way():
    ended = run_process("generate", "")
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.fullmatch(r"snapgen: the prompt is empty[^\n]*\n", ended.stderr)


def test_missing_data_is_told(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    assert "no data folder" in rejected(capfd, *GOOD)


def test_a_missing_package_is_told(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "diffusers" in rejected(capfd, *GOOD)


def test_a_bug_is_not_taken_for_wrong_input(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(snapgen_core, "load", broken)
    with pytest.raises(ZeroDivisionError):
        main(GOOD)


def test_interruption(monkeypatch, capfd, empty_folder):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapgen_core, "load", interrupted)
    assert main(GOOD) == 130
    assert capfd.readouterr().err == "snapgen: interrupted\n" and os.listdir(empty_folder) == []


# ---------------------------------------------------------------------------
# Where the picture goes


@pytest.fixture
def blocked(empty_folder):
    """Names that cannot be written, checked before anything is loaded."""
    (empty_folder / "folder.png").mkdir()
    (empty_folder / "file").write_text("x")
    return {
        "a folder": "folder.png",
        "in a missing folder": "no/such/a.png",
        "below a regular file": "file/a.png",
        "no extension": "picture",
        "another extension": "picture.jpg",
        "only an extension": ".png",
        "empty": "",
        "the root": "/",
        "too long": "a" * 300 + ".png",
        "a null byte": "a\0.png",
        "not writable": "/proc/a.png",
    }


@pytest.mark.parametrize(
    "case",
    ["a folder", "in a missing folder", "below a regular file", "no extension", "another extension", "only an extension", "empty", "the root", "too long", "a null byte", "not writable"],
)
def test_unwritable_outputs(case, blocked, monkeypatch, capfd, empty_folder):
    if case == "not writable" and not Path("/proc").is_dir():
        pytest.skip("no /proc")
    monkeypatch.setattr(snapgen_core, "load", lambda *_: pytest.fail("loaded before the output was checked"))
    before = sorted(empty_folder.rglob("*"))
    rejected(capfd, *GOOD, "--out", blocked[case])
    assert sorted(empty_folder.rglob("*")) == before


def test_an_unwritable_run_folder(empty_folder, capfd):
    (empty_folder / "file").write_text("x")
    assert "run folder" in rejected(capfd, "train", "base", "--run-dir", "file/run", "--steps", "1")


class FakePipeline:
    """Stands in for the model where a test is about files: the picture's pixels are the seed and the settings."""

    def __init__(self, fail_at=None):
        self.drawn, self.fail_at = 0, fail_at
        self.text, self.config = self, SimpleNamespace(steps=4, guidance=1.0)

    def truncated(self, prompt):
        return prompt[20:].strip() or None

    def __call__(self, prompt, num_inference_steps, guidance_scale, generator):
        self.drawn += 1
        if self.drawn == self.fail_at:
            raise KeyboardInterrupt
        pixels = (torch.rand(3, generator=generator) * 255).byte().tolist() + [num_inference_steps]
        image = Image.new("RGBA", (4, 4), tuple(pixels))
        return type("Output", (), {"images": [image]})()


@pytest.fixture
def fake(monkeypatch):
    pipe = FakePipeline()
    monkeypatch.setattr(snapgen_core, "load", lambda *_: pipe)
    return pipe


def test_the_picture_tells_how_it_was_made(fake, empty_folder, capfd):
    assert main(["generate", " a red car ☂ ", "--steps", "3", "--guidance", "2.5", "--seed", "11", "--out", "car.PNG"]) == 0
    out, err = capfd.readouterr()
    assert "car.PNG" in out and err == ""
    text = Image.open(empty_folder / "car.PNG").text
    assert {key: text[key] for key in ("prompt", "seed", "steps", "guidance", "stage", "scale")} == {
        "prompt": "a red car ☂", "seed": "11", "steps": "3", "guidance": "2.5", "stage": "distilled", "scale": "tiny",
    }
    assert os.listdir(empty_folder) == ["car.PNG"]


def test_a_series_is_numbered_and_each_picture_repeats_alone(fake, empty_folder, capfd):
    assert main([*GOOD, "--num", "3", "--seed", "5", "--out", "a.png"]) == 0
    assert sorted(os.listdir(empty_folder)) == ["a-1.png", "a-2.png", "a-3.png"]
    assert "a-1.png to a-3.png" in capfd.readouterr().out
    second = Image.open(empty_folder / "a-2.png")
    assert second.text["seed"] == "6"
    assert main([*GOOD, "--seed", "6"]) == 0  # into the default name
    assert Image.open("snapgen.png").tobytes() == second.tobytes()
    assert len({Image.open(f"a-{i}.png").getpixel((0, 0)) for i in (1, 2, 3)}) == 3


def test_a_blocked_name_in_a_series_stops_it_before_the_first(fake, empty_folder, capfd):
    (empty_folder / "a-3.png").mkdir()
    assert "a-3.png" in rejected(capfd, *GOOD, "--num", "3", "--out", "a.png")
    assert os.listdir(empty_folder) == ["a-3.png"] and fake.drawn == 0


def test_an_interrupted_series_keeps_whole_pictures_and_the_old_file(fake, empty_folder, capfd):
    (empty_folder / "a-2.png").write_bytes(b"old")
    fake.fail_at = 2
    assert main([*GOOD, "--num", "3", "--out", "a.png"]) == 130
    assert sorted(os.listdir(empty_folder)) == ["a-1.png", "a-2.png"]
    Image.open("a-1.png").load()
    assert (empty_folder / "a-2.png").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file(fake, empty_folder, monkeypatch, capfd):
    def full(path, data):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (empty_folder / "snapgen.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in rejected(capfd, *GOOD)
    assert os.listdir(empty_folder) == ["snapgen.png"] and (empty_folder / "snapgen.png").read_bytes() == b"old"


def test_what_was_cut_from_a_prompt_is_said(fake, capfd):
    assert main(["generate", "twenty letters here. and\nthen some", "--steps", "1"]) == 0
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "note" in err and "last 13 characters" in err and "then some" in err


# ---------------------------------------------------------------------------
# With the shipped weights


@pytest.fixture(scope="module")
def loaded():
    return functools.lru_cache(snapgen_core.load)


ODD_PROMPTS = {
    "plain": "a red car left of a dog",
    "10,000 letters": "x" * 10_000,
    "10,000 letters in words": "a red car " * 1000,
    "unknown words": "flibbertigibbet zqxj",
    "emoji": "🚗 🐶 👩‍👩‍👧",
    "right to left": "سيارة حمراء \u202eabc",
    "Chinese": "一辆红色的车",
    "signs": "!?;--",
    "control characters": "\x00\x07a car",
}


@pytest.mark.parametrize("kind", ODD_PROMPTS)
def test_odd_prompts_give_pictures(kind, loaded, monkeypatch, capfd, empty_folder):
    monkeypatch.setattr(snapgen_core, "load", loaded)
    assert main(["generate", ODD_PROMPTS[kind], "--steps", "2"]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    if kind == "10,000 letters in words":
        assert err.count("\n") == 1 and "characters are cut" in err
    else:  # ten thousand letters without a blank are one unknown word, which the language model does read
        assert err.count("\n") == ("characters are cut" in err)
    image = Image.open("snapgen.png")
    pixels = np.asarray(image, dtype=float)
    assert pixels.shape == (64, 64, 3) and pixels.std() > 1
    assert image.text["prompt"] == ODD_PROMPTS[kind].strip()


def test_the_words_and_the_seed_matter(loaded, monkeypatch):
    monkeypatch.setattr(snapgen_core, "load", loaded)
    runs = {"a": ["a red car"], "again": ["a red car"], "words": ["a dog"], "seed": ["a red car", "--seed", "1"], "guidance": ["a red car", "--guidance", "3"]}
    for name, arguments in runs.items():
        assert main(["generate", *arguments, "--steps", "2", "--out", f"{name}.png"]) == 0
    pixels = {name: np.asarray(Image.open(f"{name}.png")).tobytes() for name in runs}
    assert pixels["a"] == pixels["again"]
    assert len(set(pixels.values())) == 4


def test_either_decoder_draws_and_the_picture_says_which(loaded, monkeypatch):
    monkeypatch.setattr(snapgen_core, "load", loaded)
    for decoder in ("full", "tiny"):
        assert main(["generate", "a red car", "--steps", "8", "--decoder", decoder, "--out", f"{decoder}.png"]) == 0
    full, tiny = (Image.open(f"{decoder}.png") for decoder in ("full", "tiny"))
    assert (full.text["decoder"], tiny.text["decoder"]) == ("full", "tiny")
    apart = np.abs(np.asarray(full, dtype=float) - np.asarray(tiny, dtype=float)).mean()
    assert 0 < apart < 10  # of 255: two readings of one latent


def truncated(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(folder):
    save_file({"nothing.of.ours": torch.zeros(3)}, next(folder.glob("*.safetensors")))


def reshaped(folder):
    path = next(folder.glob("*.safetensors"))
    save_file({name: torch.zeros(7, dtype=tensor.dtype) for name, tensor in load_file(path).items()}, path)


def pickled(folder):
    next(folder.glob("*.safetensors")).write_bytes(b"PK\x03\x04 not safetensors")


def without_config(folder):
    (folder / "config.json").unlink()


def with_broken_config(folder):
    (folder / "config.json").write_text('{"in_channels": ')


def removed(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [truncated, foreign, reshaped, pickled, without_config, with_broken_config, removed])
@pytest.mark.parametrize("model", ["distilled", "autoencoder", "text_l"])
def test_damaged_weights_are_told_and_nothing_is_drawn(model, damage, tmp_path, monkeypatch, capfd, empty_folder):
    shutil.copytree(data_dir() / "checkpoints", tmp_path / "data" / "checkpoints")
    damage(tmp_path / "data" / "checkpoints" / "tiny" / model)
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    assert model in rejected(capfd, *GOOD)
    assert os.listdir(empty_folder) == []


def test_a_stage_draws_in_its_own_way(fake, empty_folder, capfd):
    """Its steps and guidance, unless told otherwise; what --checkpoint's name says is a stage."""
    for arguments, said in (([], "4 steps, guidance 1,"), (["--steps", "9"], "9 steps, guidance 1,"), (["--guidance", "2"], "4 steps, guidance 2,")):
        assert main(["generate", "a red car", *arguments]) == 0
        assert said in capfd.readouterr().out
    for arguments, stage in ((["--checkpoint", "weights/base"], "base"), (["--checkpoint", "weights/mine"], "distilled"), (["--checkpoint", "weights/base", "--stage", "kd"], "kd")):
        assert main(["generate", "a red car", *arguments]) == 0
        assert Image.open("snapgen.png").text["stage"] == stage


def test_another_checkpoint_can_be_named(tmp_path, capfd, empty_folder):
    shipped = data_dir() / "checkpoints" / "tiny" / "base"
    assert main([*GOOD, "--checkpoint", str(shipped)]) == 0
    os.remove("snapgen.png")
    capfd.readouterr()
    shutil.copytree(shipped, tmp_path / "mine")
    truncated(tmp_path / "mine")
    for wrong in (tmp_path / "mine", tmp_path / "no", data_dir() / "checkpoints" / "tiny" / "autoencoder", ROOT / "pyproject.toml"):
        rejected(capfd, *GOOD, "--checkpoint", wrong)
    assert os.listdir(empty_folder) == []


def test_a_student_of_other_encoders_is_refused():
    with torch.device("meta"):
        student = SnapGenUNet.from_preset("small")
    with pytest.raises(UserError, match="2304 text and 16 latent channels; the encoders of scale tiny give 384 and 16"):
        build("tiny", student)
