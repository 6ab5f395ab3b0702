"""The autoencoder and base stages: their losses by hand, pure batches, warm starts, and what ships."""

import pytest
import torch

from snapgen_core import flow
from snapgen_core.errors import UserError
from snapgen_core.latents import encode, load_autoencoder
from snapgen_core.paths import checkpoint_dir
from snapgen_core.scenes import draw_scene
from snapgen_core.stages import STAGES, build_stage
from snapgen_core.stages.autoencoder import AutoencoderStage, psnr, reconstruct
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
