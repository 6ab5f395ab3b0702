"""The parts of a bundle, called as the app calls them, against the pipeline."""

import pytest
import torch
from torch import nn

from snapgen_core import flow, load
from snapgen_core.errors import UserError
from snapgen_core.export.parts import parts
from snapgen_core.latents import decode

PROMPTS = ["a red car", "a dog left of a cat"]


@pytest.fixture(scope="module")
def pipe():
    return load("tiny", "base", decoder="tiny")


@pytest.fixture(scope="module")
def made(pipe):
    return {part.name: part for part in parts(pipe, guided=True)}


def token_ids(pipe, name, prompt, length):
    """As the app makes them: filled up to a fixed length, as floats."""
    tokenizer = pipe.text.tokenizers[name]
    return tokenizer([prompt], padding="max_length", max_length=length, truncation=True, padding_side="right", return_tensors="pt")["input_ids"].float()


def test_examples_fit_and_names_are_the_contracts(made):
    assert list(made) == ["TextEncoder", "TextEncoder2", "TextEncoder3", "MultiModalDiffusionTransformer", "VAEDecoder"]
    shapes = {}
    for name, part in made.items():
        assert list(part.inputs) == list(part.module.forward.__code__.co_varnames[1 : 1 + len(part.inputs)])
        with torch.no_grad():
            answer = part.module(**part.inputs)
        answer = answer if isinstance(answer, tuple) else (answer,)
        assert len(answer) == len(part.outputs)
        shapes[name] = [list(value.shape) for value in answer]
        assert not any(isinstance(layer, nn.GroupNorm) for layer in part.module.modules())
    assert shapes == {
        "TextEncoder": [[1, 24, 128], [1, 128]],
        "TextEncoder2": [[1, 24, 192], [1, 128]],
        "TextEncoder3": [[1, 24, 384]],
        "MultiModalDiffusionTransformer": [[2, 16, 8, 8]],
        "VAEDecoder": [[1, 3, 64, 64]],
    }


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_app_reads_a_prompt_as_the_pipeline_does(pipe, made, prompt):
    with torch.no_grad():
        clips = [made[name].module(token_ids(pipe, encoder, prompt, 24)) for name, encoder in (("TextEncoder", "clip_l"), ("TextEncoder2", "clip_g"))]
        language = made["TextEncoder3"].module(token_ids(pipe, "lm", prompt, 24))
    side_by_side = torch.cat([clips[0][0], clips[1][0]], dim=2)
    filled = torch.cat([side_by_side, torch.zeros(1, 24, 384 - side_by_side.shape[2])], dim=2)
    expected = pipe.text.encode([prompt])
    assert torch.allclose(torch.cat([filled, language], dim=1), expected, atol=1e-4)
    assert torch.allclose(torch.cat([clips[0][1], clips[1][1]], dim=1), pipe.text.pooled([prompt]), atol=1e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_a_step_of_the_app_is_a_step_of_the_pipeline(pipe, guided):
    """Batch of two, prompt first; the app mixes both with its guidance."""
    denoiser = next(part for part in parts(pipe, guided) if part.name == "MultiModalDiffusionTransformer").module
    context = pipe.text.encode([PROMPTS[0]])
    embeddings = torch.cat([context, torch.zeros_like(context)]).transpose(1, 2)[:, :, None]
    x, sigma = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.9)
    with torch.no_grad():
        prompt, negative = denoiser(torch.cat([x, x]), 1000 * sigma.expand(2), embeddings, torch.zeros(2, 256, 1, 1)).chunk(2)
        for guidance in (4.0, 7.0):
            mixed = flow.guide(negative, prompt, guidance)
            assert torch.allclose(mixed, pipe.velocity(context, guidance if guided else 1.0)(x, sigma), atol=1e-3)


def test_the_decoder_takes_the_autoencoders_range(pipe, made):
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        assert torch.allclose(made["VAEDecoder"].module(raw), decode(pipe.decoder, z), atol=1e-3)


def test_without_a_tiny_decoder_there_is_no_bundle():
    with pytest.raises(UserError, match="too large for a phone"):
        parts(load("tiny", "base"), guided=True)
