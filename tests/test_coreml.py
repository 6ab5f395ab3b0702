"""A bundle of Core ML packages: the contract's names in the saved files, the same numbers out, whole or not at all."""

import hashlib
import json

import pytest
import torch
from transformers import CLIPTokenizer

import snapgen_core
from snapgen_core import flow, load
from snapgen_core.cli import main
from snapgen_core.errors import UserError
from snapgen_core.export import coreml, verify
from snapgen_core.export.parts import parts
from snapgen_core.export.replay import Replay
from snapgen_core.text import clip_files
from snapgen_core.unet import SnapGenUNet

ct = pytest.importorskip("coremltools")

UNET = "MultiModalDiffusionTransformer"
CONTRACT = {  # name: (inputs, outputs), in order; all are 32-bit floats
    "TextEncoder": ({"input_ids": (1, 24)}, {"hidden_embeds": (1, 24, 128), "pooled_outputs": (1, 128)}),
    "TextEncoder2": ({"input_ids": (1, 24)}, {"hidden_embeds": (1, 24, 192), "pooled_outputs": (1, 128)}),
    "TextEncoder3": ({"input_ids": (1, 24)}, {"encoder_hidden_states": (1, 24, 384)}),
    UNET: (
        {"latent_image_embeddings": (2, 16, 8, 8), "timestep": (2,), "token_level_text_embeddings": (2, 384, 1, 48), "pooled_text_embeddings": (2, 256, 1, 1)},
        {"velocity": (2, 16, 8, 8)},
    ),
    "VAEDecoder": ({"z": (1, 16, 8, 8)}, {"image": (1, 3, 64, 64)}),
}


@pytest.fixture(scope="module")
def pipe():
    """The shipped pipeline around a narrow student, quicker to convert; none of its branches answers zero."""
    made = load("tiny", "base", decoder="tiny")
    torch.manual_seed(0)
    small = SnapGenUNet(**dict(made.unet.config) | {"channels": (32, 64), "head_dim": 16, "layers_per_block": 1, "time_embed_dim": 64})
    for p in small.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    made.register_modules(unet=small.eval())
    return made


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "bundle"
    return folder, coreml.export(pipe, folder, {"scale": "tiny", "stage": "base"}, "iOS17", guided=True)


@pytest.fixture(scope="module")
def bundle(exported):
    return exported[0]


def specification(bundle, name):
    return ct.utils.load_spec(str(bundle / f"{name}.mlpackage"))


@pytest.mark.parametrize("name", CONTRACT)
def test_the_saved_files_keep_the_contract(bundle, name):
    """Names, shapes, types and order, read from the package itself."""
    description = specification(bundle, name).description
    for features, wanted in zip((description.input, description.output), CONTRACT[name]):
        assert [feature.name for feature in features] == list(wanted)
        for feature in features:
            array = feature.type.multiArrayType
            assert tuple(array.shape) == wanted[feature.name], feature.name
            assert array.dataType == ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32, feature.name


def test_the_manifest_tells_what_is_there(bundle):
    manifest = coreml.read_manifest(bundle)
    assert {path.name for path in bundle.iterdir()} == {*(f"{name}.mlpackage" for name in CONTRACT), "manifest.json", "README.md", "vocab.json", "merges.txt"}
    for name, (inputs, outputs) in CONTRACT.items():
        entry = manifest["parts"][name]
        assert [(p["name"], tuple(p["shape"])) for p in entry["inputs"]] == list(inputs.items())
        assert [(p["name"], tuple(p["shape"])) for p in entry["outputs"]] == list(outputs.items())
        files = sorted(file for file in (bundle / entry["file"]).rglob("*") if file.is_file())
        assert entry["bytes"] == sum(file.stat().st_size for file in files)
        assert entry["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files if file.name != "Manifest.json")).hexdigest()
    assert any("cos" in line and "fp32" in line for line in manifest["lint"][UNET]["leaves"]) and any("padded" in line for line in manifest["lint"][UNET]["wastes"])
    assert manifest["sampler"]["sigmas_of_4_steps"] == pytest.approx([1, 0.9, 0.75, 0.5, 0]) and manifest["sampler"]["time_shift"] == 3.0
    assert (manifest["target"], manifest["stage"], manifest["guided"]) == ("iOS17", "base", True)
    readme = (bundle / "README.md").read_text()
    assert all(f"`{name}.mlpackage`" in readme for name in CONTRACT) and "one step more" in readme


def test_the_tokenizer_files_are_the_clips(bundle, pipe):
    tokenizer = CLIPTokenizer(str(bundle / "vocab.json"), str(bundle / "merges.txt"), model_max_length=24)
    for prompt in verify.PROMPTS:
        assert tokenizer(prompt)["input_ids"] == pipe.text.tokenizers["clip_l"](prompt)["input_ids"]


def test_every_part_computes_what_torch_does(exported, pipe):
    rows = verify.parity(exported[0], pipe, exported[1])
    assert [(row.part, row.output) for row in rows] == [(name, output) for name, (_, outputs) in CONTRACT.items() for output in outputs]
    for row in rows:
        assert row.fp32_db >= 50 and row.fp16_db >= 40, row


def test_the_timestep_is_kept_in_32_bits(bundle):
    """In 16 bits 900.3 is 900.5: the package tells them apart, and as the network does."""
    assert torch.tensor(900.3).half() == torch.tensor(900.5).half()
    operations = specification(bundle, UNET).mlProgram.functions["main"].block_specializations
    (block,) = operations.values()
    kinds = {op.type: op.outputs[0].type.tensorType.dataType for op in block.operations if op.type in ("sin", "cos")}
    float32 = ct.proto.MIL_pb2.DataType.FLOAT32
    assert kinds == {"sin": float32, "cos": float32}
    package = Replay(bundle / f"{UNET}.mlpackage", "fp16")
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in CONTRACT[UNET][0].items()}
    one, other = (package(**inputs | {"timestep": torch.full((2,), timestep)})["velocity"] for timestep in (900.3, 900.5))
    assert not torch.equal(one, other)
    first = next(op for op in block.operations if "timestep" in (name.name for argument in op.inputs.values() for name in argument.arguments))
    assert first.outputs[0].type.tensorType.dataType == float32, "the timestep is rounded before it is used"


def test_a_picture_of_the_bundle_is_the_pipelines(bundle, pipe):
    ours, theirs = verify.pictures(bundle, pipe, "a red car", steps=2, guidance=4.0)
    assert ours.shape == theirs.shape == (1, 3, 64, 64)
    assert verify.psnr_db(ours, theirs) >= 35
    assert verify.psnr_db(ours, verify.pictures(bundle, pipe, "a red car", steps=2, guidance=4.0, seed=1)[1]) < 35  # the bar can fail


def test_without_guidance_the_prompts_half_is_answered_twice(pipe, tmp_path):
    """And iOS18 holds the graph, too."""
    (part,) = [part for part in parts(pipe, guided=False) if part.name == UNET]
    path = tmp_path / "unet.mlpackage"
    coreml.convert(part, "iOS18").save(str(path))
    inputs = verify.realistic(part, pipe, "a red car")
    answer = Replay(path, "fp32")(**inputs)["velocity"]
    assert torch.equal(answer[0], answer[1])
    velocity = pipe.velocity(pipe.text.encode(["a red car"]), 1.0)(inputs["latent_image_embeddings"][:1], torch.tensor(0.85714))
    assert verify.psnr_db(velocity, answer[:1]) > 50 and flow.TIMESTEPS * 0.85714 == pytest.approx(857.14)


def test_what_does_not_verify_is_told(exported, pipe, monkeypatch):
    monkeypatch.setattr(verify, "parity", lambda folder, pipe, made: [verify.Parity("VAEDecoder", "image", 90.0, 34.9)])
    monkeypatch.setattr(verify, "pictures", lambda *given: (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)))
    with pytest.raises(UserError, match=r"VAEDecoder.image 90.0 dB in fp32, 34.9 in fp16, where 50 and 35 are asked"):
        verify.verify(exported[0], pipe, exported[1])
    monkeypatch.setattr(verify, "parity", lambda folder, pipe, made: [])
    with pytest.raises(UserError, match="pictures of the bundle differ"):
        verify.verify(exported[0], pipe, exported[1])


# ------------------------------------------------------------------------------------------------- at the door


def test_a_bundle_is_never_left_half_written(bundle, pipe, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("{}")
    convert, made = coreml.convert, []

    def fail_at_the_third(part, target):
        made.append(part.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return convert(part, target)

    monkeypatch.setattr(coreml, "convert", fail_at_the_third)
    for name in ("old", "new"):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            coreml.export(pipe, tmp_path / name, {}, "iOS17")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old" / "manifest.json").read_text() == "{}"


def test_a_target_that_cannot_hold_the_graph(pipe):
    part = parts(pipe, guided=True)[0]
    with pytest.raises(UserError, match="unknown target 'iOS12'"):
        coreml.convert(part, "iOS12")

    class Exotic(torch.nn.Module):
        def forward(self, input_ids):
            return torch.special.bessel_j0(input_ids)

    with pytest.raises(UserError, match="iOS18 cannot hold TextEncoder: "):
        coreml.convert(coreml.Part("TextEncoder", Exotic(), part.inputs, ("hidden_embeds",)), "iOS18")


def test_a_tokenizer_of_another_kind(pipe):
    for other in (object(), pipe.text.tokenizers["lm"]):
        with pytest.raises(UserError, match="no tokenizer of CLIP's kind"):
            clip_files(other)


def test_no_bundle_and_a_damaged_one(bundle, tmp_path):
    with pytest.raises(UserError, match="is no bundle"):
        coreml.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text((bundle / "manifest.json").read_text())
    with pytest.raises(UserError, match="lacks TextEncoder.mlpackage"):
        coreml.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "iOS3"], "invalid choice"),
        (["--out", "things"], "something else in it"),
        (["--out", "things/file"], "a bundle is a folder"),
        (["--checkpoint", "things"], "no student in things"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "file").write_text("precious")
    assert main(["export", *(arguments if "--out" in arguments else [*arguments, "--out", "new"])]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("snapgen:")]) == 1 and message in told[-1]
    assert (tmp_path / "things" / "file").read_text() == "precious" and not (tmp_path / "new").exists()


def test_the_command_exports_and_verifies(pipe, tmp_path, monkeypatch, capfd):
    asked = {}
    monkeypatch.setattr(snapgen_core, "load", lambda *given, **more: asked.update(given=given, **more) or pipe)
    monkeypatch.setattr(coreml, "export", lambda pipe, out, facts, target, guided, bits, core_ai: (out.mkdir(), (out / "manifest.json").write_text(json.dumps({"parts": {}})), asked.update(target=target, guided=guided, bits=bits)))
    monkeypatch.setattr(verify, "verify", lambda out, pipe, made: {"parts": [{"part": "VAEDecoder", "output": "image", "fp32_db": 90.0, "fp16_db": 70.5, "core_ai_db": 123.4}], "picture": {"steps": 4, "fp16_db": 60.0}})
    assert main(["export", "--stage", "distilled", "--out", str(tmp_path / "b"), "--target", "iOS17", "--bits", "4.3", "--verify", "--json", str(tmp_path / "m.json")]) == 0
    out = capfd.readouterr().out
    assert "123.4" in out and "70.5" in out and "60.0" in out and f"bundle {tmp_path / 'b'}" in out
    assert asked["decoder"] == "tiny" and asked["target"] == "iOS17" and asked["guided"] is False and asked["bits"] == 4.3
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["command"].startswith("snapgen export --stage distilled") and written["parity"]["picture"]["fp16_db"] == 60.0
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["parity"]["picture"]["fp16_db"] == 60.0
