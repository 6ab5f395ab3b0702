"""The autoencoder and base stages: their losses by hand, pure batches, warm starts, and what ships."""

from types import SimpleNamespace

import pytest
import torch

from snapgen_core import flow
from snapgen_core.errors import UserError
from snapgen_core.evaluate import validation_batch, validation_losses
from snapgen_core.evaluate.fidelity import psnr
from snapgen_core.latents import encode, load_autoencoder, reconstruct
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import load_unet
from snapgen_core.scales import ABLATION, UNET_PRESETS
from snapgen_core.scenes import draw_scene
from snapgen_core.stages import STAGES, build_stage
from snapgen_core.stages.ablation import AblationStage
from snapgen_core.stages.autoencoder import AutoencoderStage
from snapgen_core.stages.base import BaseTraining
from snapgen_core.unet import SnapGenUNet


def unseen(count):
    return torch.stack([draw_scene(0, i, "seen").image for i in range(count)])


def test_unknown_stage_names_the_choices():
    with pytest.raises(UserError, match="choose one of " + ", ".join(STAGES)):
        build_stage("everything", "tiny")


def test_batches_are_a_pure_function_of_seed_and_step():
    a, b = AutoencoderStage("tiny", 3), AutoencoderStage("tiny", 3)
    assert all(torch.equal(a.batch(5)[key], value) for key, value in b.batch(5).items())
    assert not torch.equal(a.batch(5)["noise"], a.batch(6)["noise"])
    whole = a.batch(5)["image"]
    assert torch.equal(torch.stack([a.batch(5, r, 2)["image"] for r in range(2)], dim=1).flatten(0, 1), whole)


def test_autoencoder_loss_by_hand():
    stage = AutoencoderStage("tiny", 0)
    batch = {key: value[:2] for key, value in stage.batch(0).items()}
    loss, _ = stage.module(**batch)
    vae, image = stage.module.vae, batch["image"]
    mean, logvar = vae.encode(image).latent_dist.mean, vae.encode(image).latent_dist.logvar
    z = mean + (0.5 * logvar).exp() * batch["noise"] + mean.std() * batch["level"].reshape(2, 1, 1, 1) * batch["noise"]
    error = vae.decode(z).sample - image
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    assert loss.item() == pytest.approx((error.abs().mean() + 4 * error.pow(2).mean() + 1e-4 * kl).item(), rel=1e-4)


def test_warm_autoencoder_trains_the_decoder_alone_and_keeps_the_latent(tmp_path):
    stage = AutoencoderStage("tiny", 0)
    stage.load(checkpoint_dir("tiny"))
    before = {name: tensor.clone() for name, tensor in stage.module.vae.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in stage.module.parameters() if p.requires_grad], lr=1e-2)
    stage.module(**{key: value[:2] for key, value in stage.batch(0).items()})[0].backward()
    optimizer.step()
    changed = {name for name, tensor in stage.module.vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    stage.save(tmp_path)
    shipped, again = load_autoencoder("tiny"), load_autoencoder("tiny", tmp_path / "autoencoder")
    assert torch.equal(encode(shipped, unseen(1)), encode(again, unseen(1)))


def test_ablation_trains_each_network_as_if_alone():
    stage = AblationStage("tiny", 0)
    assert list(stage.module.unets) == list(ABLATION) and len(ABLATION) == 7
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(2, 16, 8, 8, generator=generator) for name in ("x0", "eps")}
    batch |= {"sigma": torch.tensor([0.3, 0.8]), "context": torch.randn(2, 48, 384, generator=generator)}
    loss, figures = stage.module(**batch)
    loss.backward()
    assert loss.item() == pytest.approx(sum(value.item() for value in figures.values()))
    for letter, unet in stage.module.unets.items():
        together = {name: p.grad.clone() for name, p in unet.named_parameters()}
        unet.zero_grad()
        alone, _ = BaseTraining(unet)(**batch)
        alone.backward()
        assert alone.item() == pytest.approx(figures[f"loss_{letter}"].item())
        assert all(torch.allclose(p.grad, together[name], atol=1e-6) for name, p in unet.named_parameters())


def test_ablation_seeds_differ_and_its_folders_load(tmp_path):
    one, other = AblationStage("tiny", 0), AblationStage("tiny", 1)
    assert not torch.equal(one.module.unets["g"].conv_in.weight, other.module.unets["g"].conv_in.weight)
    folders = one.save(tmp_path)
    assert [folder.name for folder in folders] == [f"ablation-{letter}" for letter in ABLATION]
    loaded = load_unet(folders[-1]).state_dict()
    assert all(torch.allclose(tensor, loaded[name], atol=1e-3) for name, tensor in one.module.unets["g"].state_dict().items())
    with pytest.raises(UserError, match="from scratch"):
        one.load(tmp_path)
    with pytest.raises(UserError, match="tiny only"):
        AblationStage("paper", 0)


def test_tiny_ablation_has_the_switches_of_the_papers():
    for letter in ABLATION:
        tiny, paper = UNET_PRESETS[f"tiny-ablation-{letter}"], UNET_PRESETS[f"ablation-{letter}"]
        for switch in ("self_attention", "separable_conv", "expansion", "ffn_ratio", "kv_heads", "residual_blocks", "qk_norm", "rope"):
            assert getattr(tiny, switch) == getattr(paper, switch), (letter, switch)
        assert [depth > 0 for depth in tiny.transformer_depth] == [depth > 0 for depth in paper.transformer_depth]


def test_validation_is_the_same_for_all_and_of_the_trainings_levels():
    a, b = validation_batch("tiny", 24), validation_batch("tiny", 24)
    assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = flow.sample_sigmas(100_000, torch.Generator().manual_seed(0))
    assert a["sigma"].mean().item() == pytest.approx(drawn.mean().item(), abs=0.01)
    assert a["sigma"].std().item() == pytest.approx(drawn.std().item(), abs=0.02)
    truth = lambda x, t, context: SimpleNamespace(sample=a["eps"][: len(x)] - a["x0"][: len(x)])  # noqa: E731
    assert validation_losses(truth, a).abs().max() < 1e-6
    nothing = lambda x, t, context: SimpleNamespace(sample=torch.zeros_like(x))  # noqa: E731
    expected = (a["eps"] - a["x0"]).square().mean(dim=(1, 2, 3))
    assert torch.allclose(validation_losses(nothing, a, size=7), expected)


def test_scales_with_pretrained_parts_have_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        AutoencoderStage("paper", 0)


def test_shipped_autoencoder_is_faithful_and_its_latents_are_normalised():
    vae, images = load_autoencoder("tiny"), unseen(96)
    assert psnr(reconstruct(vae, images), images).mean() >= 28
    z = encode(vae, images)
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


def test_psnr_of_known_errors():
    image = torch.zeros(3, 3, 4, 4)
    noisy = image + torch.tensor([0.2, 0.02, 0.002])[:, None, None, None]
    assert torch.allclose(psnr(noisy, image), torch.tensor([20.0, 40.0, 60.0]), atol=1e-3)


def test_base_loss_is_equation_2():
    torch.manual_seed(0)
    unet = SnapGenUNet.from_preset("tiny")
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)  # a new network answers zero, which would hide mistakes
    x0, eps = torch.randn(2, 3, 16, 8, 8)
    sigma, context = torch.rand(3), torch.randn(3, 48, 384)
    loss, _ = BaseTraining(unet)(x0, eps, sigma, context)
    with torch.no_grad():
        squares = []
        for i in range(3):
            x_t = (1 - sigma[i]) * x0[i] + sigma[i] * eps[i]
            v = unet(x_t[None], 1000 * sigma[i : i + 1], context[i : i + 1]).sample[0]
            squares.append(((eps[i] - x0[i]) - v).pow(2).mean())
    assert loss.item() == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in unet.parameters())
    assert flow.flow_matching_loss(eps - x0, x0, eps).max() == 0
