"""SceneEval: draw pictures for prompts of the six tasks, look at them with the detector, judge by GenEval's rules."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import flow
from ..detector import IMAGE_SIZE, THRESHOLD, Detector
from ..devices import best_device
from ..errors import UserError
from ..latents import decode, load_autoencoder, load_decoder
from ..paths import checkpoint_dir
from ..scales import SAMPLING, get_scale
from ..scenes import CLASSES, COLOURS, HELD_OUT_TASKS, TASKS, Prompt, draw_prompt
from ..teachers import Teacher, TeacherText, guided_velocity, load_teacher, sample
from ..weights import load_model
from .report import Report
from .rules import COUNTING_THRESHOLD, judge

# captions, one seed a picture -> images [B, 3, H, W] in [-1, 1]
Generate = Callable[[list[str], list[int]], Tensor]


def load_detector(folder: Path | None = None) -> Detector:
    """The shipped detector (one for all scales) or the one in `folder`, in fp32 and ready to judge.

    Raises:
        UserError: it is missing, truncated, or a detector of other classes.
    """
    folder = Path(folder or checkpoint_dir("tiny") / "detector")
    if not (folder / "config.json").is_file():
        raise UserError(f"no detector in {folder}: train one with `snapgen train detector --ship`")
    detector = load_model(Detector, folder, f"the detector in {folder}")
    if tuple(detector.config.classes) != CLASSES or tuple(detector.config.colours) != COLOURS:
        raise UserError(f"the detector in {folder} knows other classes or colours than the scenes: train it again")
    return detector


def scene_prompts(per_task: int, seed: int = 0, split: str = "seen") -> list[Prompt]:
    """`per_task` prompts of each judged task of `split` ("seen": six tasks, "held_out": four), task by task."""
    tasks = HELD_OUT_TASKS if split == "held_out" else TASKS
    # Every task has its own indices, or equal draws would put the same objects into all of them.
    numbers = {task: range(TASKS.index(task), per_task * len(TASKS), len(TASKS)) for task in tasks}
    return [draw_prompt(seed, i, split, task) for task in tasks for i in numbers[task]]


def picture_seed(seed: int, caption: str, number: int) -> int:
    """The seed of picture `number` of a caption: the same whatever else is drawn."""
    return int(np.random.SeedSequence([seed, number, *caption.encode()]).generate_state(1)[0])


def judge_prompts(
    generate: Generate,
    prompts: Sequence[Prompt],
    detector: Detector,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    label: str = "SceneEval",
) -> dict[str, list[list[bool]]]:
    """Outcomes by task: for each prompt, whether each of its pictures is right."""
    drawn: Counter[str] = Counter()  # a caption that comes again gets new pictures
    jobs = []
    for i, prompt in enumerate(prompts):
        for _ in range(images_per_prompt):
            jobs.append((i, picture_seed(seed, prompt.text, drawn[prompt.text])))
            drawn[prompt.text] += 1
    right: list[list[bool]] = [[] for _ in prompts]
    with tqdm(total=len(jobs), desc=label, unit="image", dynamic_ncols=True, disable=not progress) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            images = generate([prompts[i].text for i, _ in batch], [s for _, s in batch])
            if images.ndim != 4 or images.shape[:2] != (len(batch), 3):
                raise ValueError(f"expected generated images [{len(batch)}, 3, H, W], got {list(images.shape)}")
            found = detector.detect(images, min(THRESHOLD, COUNTING_THRESHOLD))
            for (i, _), detections in zip(batch, found):
                right[i].append(judge(prompts[i], detections))
            bar.update(len(batch))
    outcomes: dict[str, list[list[bool]]] = {}
    for prompt, pictures in zip(prompts, right):
        outcomes.setdefault(prompt.task, []).append(pictures)
    return outcomes


def scene_eval(
    generate: Generate,
    per_task: int,
    images_per_prompt: int = 1,
    seed: int = 0,
    detector: Detector | None = None,
    held_out_per_task: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Report:
    """Score a generator.

    Args:
        generate: (captions, seeds) -> images [B, 3, H, W] in [-1, 1]; each picture depends on its own seed alone.
        per_task: prompts of each of the six tasks, of compositions that training may have shown.
        images_per_prompt: pictures of each prompt. GenEval has 553 prompts and draws 4 of each; scenes have more
            prompts than anyone can draw, and other prompts say more than other pictures.
        detector: default the shipped one.
        held_out_per_task: prompts of each of the four held-out tasks (default half of `per_task`; 0 for none).
    """
    if per_task < 1 or images_per_prompt < 1:
        raise ValueError(f"expected at least one prompt and one image, got {per_task} and {images_per_prompt}")
    detector = detector or load_detector()
    held_out_per_task = per_task // 2 if held_out_per_task is None else held_out_per_task

    def outcomes(split: str, count: int) -> dict[str, list[list[bool]]]:
        prompts = scene_prompts(count, seed, split)
        return judge_prompts(generate, prompts, detector, images_per_prompt, seed, batch_size, progress, split)

    seen = outcomes("seen", per_task)
    return Report.of(seen, outcomes("held_out", held_out_per_task) if held_out_per_task else None, seed)


def pipeline_generator(pipe, steps: int = 28, guidance: float = 4.0) -> Generate:
    """What `scene_eval` asks for, from a SnapGenPipeline."""

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = dict(num_inference_steps=steps, guidance_scale=guidance, output_type="pt")
        return pipe(captions, generator=generators, **settings).images

    return generate


def relay_generator(pipe, teacher: Teacher, text: TeacherText, levels: tuple[float, float], steps: int, guidance: float) -> Generate:
    """As `pipeline_generator`, but at noise levels sigma with levels[0] < sigma <= levels[1] the teacher answers in the student's
    place. How much better the pictures become says what its lead at these levels is worth."""
    low, high = levels

    @torch.no_grad()
    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        student = pipe.velocity(pipe.text.encode(captions), guidance)
        helper = guided_velocity(teacher, *text([*[""] * len(captions), *captions]), guidance)
        noise = pipe.noise(len(captions), [torch.Generator().manual_seed(seed) for seed in seeds])
        latents = flow.sample(lambda x, sigma: (helper if low < sigma <= high else student)(x, sigma), noise, pipe.sigmas(steps))
        return decode(pipe.painter, latents)

    return generate


def evaluate_unet(
    scale: str, unet, images: int, seed: int = 0, steps: int = 28, guidance: float = 4.0
) -> dict[str, float]:
    """Scores of a student in memory, for its stage's card: as `evaluate_stage`, without the intervals."""
    from ..pipeline import build

    pipe = build(scale, unet).to(unet.device)
    return scene_eval(pipeline_generator(pipe, steps, guidance), images, seed=seed).figures()


def teacher_generator(scale: str, teacher: Teacher, text: TeacherText, steps: int = 28, guidance: float = 4.0, decoder: str = "full") -> Generate:
    """What `scene_eval` asks for, from a teacher: the same prompts and noise as a student's."""
    config = get_scale(scale)
    device, shape = teacher.transformer.device, (config.latent_channels, config.latent_size, config.latent_size)
    painter = load_autoencoder(scale) if decoder == "full" else load_decoder(checkpoint_dir(scale) / "decoder")
    painter.to(device)

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return decode(painter, sample(teacher, text, captions, noise.to(device), flow.inference_sigmas(steps, config.shift), guidance))

    return generate


def stage_generator(scale: str, stage: str, steps: int, guidance: float, folder: Path | None = None, decoder: str = "full", bits: float | None = None, relay: tuple[float, float] | None = None) -> tuple[Generate, dict]:
    """What `scene_eval` asks for, from a shipped model or the one in `folder`, and figures of its palettes: with `bits` its
    weights take so many on average, as `squeeze` does it, and 16 rounds them; `relay` as for `relay_generator`."""
    from .. import load
    from ..export.squeeze import squeeze_pipeline

    device = best_device()
    if stage in ("teacher", "turbo"):
        teacher, text = load_teacher(scale, folder, few_steps=stage == "turbo")
        return teacher_generator(scale, teacher.to(device), text.to(device), steps, guidance, decoder), {}
    pipe, squeezed = load(scale, stage, folder, decoder).to(device), {}
    if bits is not None:
        squeezed = squeeze_pipeline(pipe, bits, guided=guidance != 1)
    if relay is not None:
        teacher, text = load_teacher(scale)
        return relay_generator(pipe, teacher.to(device), text.to(device), relay, steps, guidance), squeezed
    return pipeline_generator(pipe, steps, guidance), squeezed


def evaluate_stage(
    scale: str, stage: str, images: int, seed: int = 0, steps: int | None = None, guidance: float | None = None, folder: Path | None = None, decoder: str = "full", variety: bool = False, bits: float | None = None, relay: tuple[float, float] | None = None
) -> dict:
    """SceneEval of a shipped model (or of the one in `folder`) as a JSON-able dict: `Report.to_dict()` and the settings.

    `steps` and `guidance` are the stage's own by default (`scales.SAMPLING`).
    `images` counts the pictures of each of the six tasks; each of the four held-out tasks adds half as many. With `variety`
    there are also the figures of `variety.measure`; `bits` and `relay` as for `stage_generator`.
    """
    from .variety import measure

    steps = SAMPLING[stage][0] if steps is None else steps
    guidance = SAMPLING[stage][1] if guidance is None else guidance
    generate, squeezed = stage_generator(scale, stage, steps, guidance, folder, decoder, bits, relay)
    figures = scene_eval(generate, images, seed=seed).to_dict() | ({"palettes": squeezed} if squeezed else {})
    if variety:
        figures["variety"] = measure(generate, get_scale(scale).image_size, seed=seed)
    settings = {
        "scale": scale,
        "stage": stage,
        "decoder": decoder,
        **({"relay": list(relay)} if relay else {}),
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "images_per_task": images,
        "images_per_held_out_task": images // 2,
        "threshold": THRESHOLD,
        "counting_threshold": COUNTING_THRESHOLD,
        "detector_pixels": IMAGE_SIZE,
    }
    return {**figures, "settings": settings}
