"""Stage `distilled`: the student learns to draw in four steps (Sec. 3.4, Eq. 9; Sec. 4, "Training Recipe", last step).

Two players take turns. The discriminator's heads learn to tell noisy latents made from data from those made from the
student's guesses; the student learns to be taken for data, and beside that Eq. 7 with the few-step teacher.

The data are latents drawn by a teacher, as in LADD, which the paper follows [Sauer et al. 2024]; ours are the few-step teacher's.
Scenes would have the task loss, which has most of the weight in the middle steps (Eq. 7), pull these towards what captions mean
without guidance; and guidance is what the student has to do without from here on.

One decision goes beyond the paper's text, which does not say where x_t comes from in this step. Only a part of a batch are noised
data; for the rest the student runs from pure noise to the level t by itself, for there it will have to go on when it draws
["backward simulation", Yin et al. 2024]. No clean latent belongs to such an x_t, so these samples have no task loss: Eq. 4 takes
the place of Eq. 7 there.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from .. import flow
from ..adversarial import LatentDiscriminator, discriminator_loss, gradient_penalty
from ..diagnostics import concerns
from ..devices import best_device
from ..distill import output_loss, scaled
from ..evaluate import evaluate_unet
from ..evaluate.variety import diversity
from ..figures import image_grid
from ..files import append_jsonl, atomic_write, read_jsonl
from ..paths import cache_dir, checkpoint_dir
from ..pipeline import build, load_unet
from ..scales import get_scale
from ..teachers import StoredText, Teacher, drawn_latents, load_teacher
from ..train import TrainSettings, step_generator, trim_log
from ..unet import SnapGenUNet
from ..weights import save_half
from .base import TrainingSet
from .kd import TaughtStage

STEPS = 4  # of the student, and of its teacher
DRAWN = 8192  # latents to learn from
HEADS_EVERY = 4  # of so many steps the first one is the heads', the others are the student's
NOISED_EVERY = 4  # of so many samples at each level one is noised data, the others are places on the student's own run
BLOCKS = (1, 3, 5)  # of the few-step teacher's twin; at other scales as many at the same depths
PENALTY = 0.0  # weight of R1, for a judge that wins; ours is far from that
WATCHED = ("a dog", "three apples", "a purple elephant", "a crown above a penguin", "a green car and a yellow hat")  # drawn along the training
PARTS = ("adversarial", "kd")  # of the student's objective; --only trains with one of them


class DistilledTraining(nn.Module):
    """forward(heads_turn [1], ...) -> (Eq. 9 for the player whose turn it is, figures); see both losses for what they take.

    Hinge losses take the place of the logarithms [Sauer et al. 2024].

    Args:
        ask: the few-step teacher's velocity of (x_t, timestep, context, pooled); a function and no module, as the features are.
    """

    def __init__(self, unet: SnapGenUNet, discriminator: LatentDiscriminator, ask: Callable[..., Tensor], shift: float, parts: tuple[str, ...] = PARTS):
        super().__init__()
        self.unet, self.discriminator, self.ask = unet, discriminator, ask
        self.shift, self.parts = shift, parts

    def forward(self, heads_turn: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.heads_loss(**batch) if heads_turn else self.students_loss(**batch)

    @torch.no_grad()
    def place(self, x0: Tensor, eps: Tensor, sigma: Tensor, own: Tensor, context: Tensor) -> Tensor:
        """x_t: by Eq. 1 from data x0, or, where `own` [B] is true, where the student's own run from `eps` is at level `sigma`."""
        x, levels = eps.clone(), flow.inference_sigmas(STEPS, self.shift).to(sigma)
        for here, there in zip(levels, levels[1:]):
            on = own & (sigma < here)  # those that have further to go
            if on.any():
                v = self.unet(x[on], (flow.TIMESTEPS * here).expand(len(x[on])), context[on]).sample
                x[on] = flow.euler_step(x[on], v.to(x.dtype), here, there)
        return torch.where(own[:, None, None, None], x, flow.interpolate(x0, eps, sigma))

    def guess(self, x_t: Tensor, sigma: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The student's velocity at x_t, and x0' = G(x_t, t), the clean latent that it points to."""
        v = self.unet(x_t, flow.TIMESTEPS * sigma, context).sample
        return v, flow.predicted_x0(x_t, v, sigma)

    def heads_loss(self, x0: Tensor, eps: Tensor, sigma: Tensor, own: Tensor, context: Tensor, below: Tensor, real_eps: Tensor, made_eps: Tensor, teachers_context: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side. x0 and the noises are [B,16,h,w], `sigma` [B] is the level t at which the student guesses,
        `below` [B] that of t - 1, to which guess and data are noised again; `own` as in `place`; the rest is text."""
        judge = self.discriminator
        with torch.no_grad():
            made = self.guess(self.place(x0, eps, sigma, own, context), sigma, context)[1]
            real, made = (judge.features(flow.interpolate(x, noise, below), flow.TIMESTEPS * below, teachers_context, pooled, judge.blocks) for x, noise in ((x0, real_eps), (made, made_eps)))
        logits, made_logits = judge.judge(real, below, pooled), judge.judge(made, below, pooled)
        loss = discriminator_loss(logits, made_logits)
        if PENALTY:
            loss = loss + PENALTY * gradient_penalty(judge, real, below, pooled)
        accuracy = (torch.cat([logits, -made_logits]) > 0).float().mean()
        return loss, {"judge": loss.detach(), "accuracy": accuracy, **by_level("real", logits, below), **by_level("made", made_logits, below)}

    def students_loss(self, x0: Tensor, eps: Tensor, sigma: Tensor, own: Tensor, context: Tensor, below: Tensor, made_eps: Tensor, teachers_context: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's side; arguments as above."""
        x_t = self.place(x0, eps, sigma, own, context)
        v, made = self.guess(x_t, sigma, context)
        figures, terms = {}, {}
        if "adversarial" in self.parts:
            frozen = {name: tensor.detach() for name, tensor in self.discriminator.named_parameters()}
            terms["adversarial"] = -functional_call(self.discriminator, frozen, (flow.interpolate(made, made_eps, below), below, teachers_context, pooled)).mean()
        if "kd" in self.parts:
            output = output_loss(self.ask(x_t, flow.TIMESTEPS * sigma, teachers_context, pooled).float(), v.float())
            task = flow.flow_matching_loss(v, x0, eps)[~own]
            noised = scaled(task, output[~own], flow.unshift(sigma[~own], self.shift))  # Eq. 7, mean over the samples
            terms["kd"] = (noised * len(task) + output[own].sum()) / len(output)
            figures = {"task": task.detach().mean(), "output": output.detach().mean()}
        # How hard each term pulls is known at v; from there one walk back through the student is enough for both.
        pulls = {name: torch.autograd.grad(term, v, retain_graph=True)[0] for name, term in terms.items()}
        walk = (v * sum(pulls.values())).sum()
        loss = walk + (sum(terms.values()) - walk).detach()
        return loss, figures | {name: term.detach() for name, term in terms.items()} | {f"{name}_pull": pull.norm() for name, pull in pulls.items()}


def discriminator_on(teacher: Teacher) -> LatentDiscriminator:
    """New heads on `teacher`'s blocks, at the depths of BLOCKS in the tiny twin."""
    held, depth = teacher.transformer.config, get_scale("tiny").teacher["num_layers"]
    blocks = [(block + 1) * held.num_layers // depth - 1 for block in BLOCKS]
    return LatentDiscriminator(teacher.block_features, teacher.transformer.inner_dim, held.pooled_projection_dim, blocks)


def by_level(name: str, logits: Tensor, below: Tensor) -> dict[str, Tensor]:
    """The mean logit at each noise level of the batch."""
    means = logits.detach().flatten(1).mean(1)
    return {f"{name} at {level:.2f}": means[below == level].mean() for level in below.unique()}


class DistilledStage(TaughtStage):
    """See `snapgen_core.train.Stage`.

    Args:
        teacher: folder of a few-step teacher in place of the scale's own.
        only: one of PARTS; the other is left out of the student's objective.
        t5: "no" leaves out SD3.5's largest text encoder.
    """

    name = "distilled"

    def __init__(self, scale: str, seed: int, teacher: Path | None = None, only: str | None = None, t5: str | None = None):
        self.scale, self.seed = scale, seed
        options = {"teacher": teacher, "only": only, "t5": t5 if t5 == "no" else None}
        self.options = {name: str(value) for name, value in options.items() if value is not None}
        self.teacher, self.text = load_teacher(scale, teacher, t5 != "no", few_steps=True)
        torch.manual_seed(seed)
        unet = load_unet(checkpoint_dir(scale) / "kd")
        self.module = DistilledTraining(unet, discriminator_on(self.teacher), self.ask, get_scale(scale).shift, PARTS if only is None else (only,)).to(memory_format=torch.channels_last)
        self.settings = TrainSettings(batch_size=64, learning_rate=4e-4, rates=(("discriminator.", 3e-3),), turns=True, steps=3_000, cooldown=1 / 2)

    @cached_property
    def data(self) -> TrainingSet:
        return TrainingSet(self.scale, 0, DRAWN)  # for their captions: the clean latents are the few-step teacher's

    def prepare(self) -> None:
        super().prepare()
        self.captions = self.data.scenes.captions
        self.latents = drawn_latents(self.teacher, self.text, self.captions, self.scale, STEPS, cache_dir(self.scale))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Latents that the few-step teacher has drawn [B,16,h,w], the student's context [B,L,D], and their prompts."""
        rows = torch.randint(len(self.latents), (count,), generator=generator, device=generator.device).tolist()
        prompts = [self.captions[row] for row in rows]
        return self.latents[rows].to(generator.device).float(), StoredText(self.data.embeddings)(prompts)[0], prompts

    def heads_turn(self, step: int) -> bool:
        return "adversarial" in self.module.parts and step % HEADS_EVERY == 0

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        generator, count = step_generator(self.seed, step, rank, best_device()), self.settings.batch_size // world
        x0, context, prompts = self.draw(count, generator)
        noises = {name: torch.randn(x0.shape, generator=generator, device=x0.device) for name in ("eps", "made_eps", "real_eps")}
        sigmas = flow.inference_sigmas(STEPS, get_scale(self.scale).shift).to(x0.device)
        number = torch.arange(count, device=x0.device)
        level = number % STEPS  # as many samples at every level
        batch = {"x0": x0, "context": context, "sigma": sigmas[level], "below": sigmas[level + 1], "own": number // STEPS % NOISED_EVERY != 0, **noises}
        teachers_context, pooled = self.text(prompts)
        batch |= {"teachers_context": teachers_context, "pooled": pooled, "heads_turn": torch.tensor([self.heads_turn(step)])}
        if not batch["heads_turn"]:
            del batch["real_eps"]
        return batch

    def ask(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The few-step teacher's velocities."""
        return self.teacher(x, timestep, context, pooled)[0]

    @torch.no_grad()
    def watch(self, run_dir: Path, step: int, average: dict[str, Tensor]) -> None:
        """Pictures from fixed noise into DIR/samples, their diversity into DIR/watch.jsonl; says what is wrong."""
        unet = copy.deepcopy(self.module.unet).eval()
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in average.items() if name.startswith("unet.")})
        pipe = build(self.scale, unet).to(unet.device)
        prompts = [prompt for prompt in WATCHED for _ in range(4)]
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        pictures = pipe(prompts, num_inference_steps=STEPS, guidance_scale=1.0, generator=generators, output_type="pt").images.cpu()
        (run_dir / "samples").mkdir(exist_ok=True)
        with atomic_write(run_dir / "samples" / f"step-{step:08d}.png") as part:
            image_grid(pictures, columns=4, rows=WATCHED).save(part)
        seen = run_dir / "watch.jsonl"
        trim_log(seen, step - 1)
        append_jsonl(seen, {"step": step, "diversity": diversity(pictures.unflatten(0, (-1, 4))).mean().item()})
        for concern in concerns(read_jsonl(run_dir / "log.jsonl"), read_jsonl(seen)):
            tqdm.write(f"step {step}: {concern}")

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """SceneEval at four steps without guidance, overall and by task."""
        return evaluate_unet(self.scale, self.module.unet, images=50, steps=STEPS, guidance=1.0)

    def save(self, root: Path) -> list[Path]:
        save_half(self.module.unet, root / self.name)
        return [root / self.name]

    def load(self, root: Path) -> None:
        self.module.unet.load_state_dict(load_unet(root / self.name).state_dict())
