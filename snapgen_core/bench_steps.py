"""What few steps save: a picture of the few-step student beside one of the student before, drawn in many guided steps; and
what stage `distilled` costs at the paper's size, counted without weights."""

import statistics

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .bench import timed
from .bench_kd import SD35_LARGE, TEXT_ENCODERS, paper_costs, saved_bytes
from .devices import best_device
from .latents import decode
from .pipeline import SnapGenPipeline, load
from .profile import count_parameters
from .scales import SAMPLING
from .stages.distilled import NOISED_EVERY, STEPS, discriminator_on
from .teachers import Teacher

PROMPT = "a red car left of a dog"
COUNTS = (1, 8)  # pictures at once
FLOPS = 0.4 * 312e12  # an A100's in bf16 at a usual share of its peak: assumed, for the estimate of a step's time
STAGES = {"before": "kd", "after": "distilled"}


class Pictures:
    """A pipeline that draws `count` pictures at once from prompts to PIL, text encoders and tiny decoder (Sec. 3.2) included."""

    def __init__(self, pipe: SnapGenPipeline, count: int):
        self.pipe = pipe.to(best_device())
        self.prompts = [PROMPT] * count
        self.noise = pipe.noise(count, torch.Generator().manual_seed(0))

    def __call__(self) -> None:
        self.pipe(self.prompts, latents=self.noise)

    def parts(self) -> dict:
        """What the time goes to, to be timed one by one."""
        context = self.pipe.text.encode(self.prompts)
        field = self.pipe.velocity(context, self.pipe.config.guidance)
        sigma = torch.tensor(0.5)
        return {"text": lambda: self.pipe.text.encode(self.prompts), "step": lambda: field(self.noise, sigma), "decoder": lambda: decode(self.pipe.decoder, self.noise)}


@torch.no_grad()
def time_pictures(scale: str, runs: int, count: int = 1, progress: bool = True) -> dict:
    """Seconds of `count` pictures before and after step distillation, end to end and by part. The two take turns, so that a
    machine whose speed changes does it to both; `ratio` is the median of before over after."""
    pictures = {name: Pictures(load(scale, stage, decoder="tiny"), count) for name, stage in STAGES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pictures}
    calls = {name: picture.parts() for name, picture in pictures.items()}
    parts: dict[str, dict[str, list[float]]] = {name: {part: [] for part in named} for name, named in calls.items()}
    for picture in pictures.values():
        picture()  # the first one takes memory
    for _ in tqdm(range(runs), desc="pictures", unit="round", leave=False, disable=not progress):
        for name, picture in pictures.items():
            seconds[name] += timed(picture, 1, picture.pipe.device)
            for part, call in calls[name].items():
                parts[name][part] += timed(call, 1, picture.pipe.device)
    result: dict = {"count": count, "ratio": statistics.median(before / after for before, after in zip(seconds["before"], seconds["after"]))}
    for name, stage in STAGES.items():
        steps, guidance = SAMPLING[stage]
        result[name] = {"stage": stage, "steps": steps, "guidance": guidance, "seconds": seconds[name], "median": statistics.median(seconds[name])}
        result[name]["parts"] = {part: statistics.median(times) for part, times in parts[name].items()}
    return result


class Judged(nn.Module):
    """The discriminator together with its frozen teacher, whose weights are no activations."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher
        self.judge = discriminator_on(teacher)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.judge(**inputs)


def paper_training(text_tokens: int = 333) -> dict[str, float]:
    """MACs and bytes of stage `distilled` at 1024 pixels with a teacher of SD3.5-Large's shape, counted on meta tensors.

    Heads' turn: the student's way to x_t, its guess, and the teacher's features of guess and data, forward alone. Student's
    turn: its way to x_t, the student forward and backward (twice the MACs of forward), the teacher's answer, and the teacher's
    features forward and backward (to its inputs alone: once the MACs). `state_bytes`: student and heads in fp32 with gradients,
    two moments and the average; teacher and text encoders in bf16. Both turns' `seconds` of a sample are those of their MACs at FLOPS.
    """
    costs = paper_costs(teacher_tokens=text_tokens)
    with torch.device("meta"):
        half = {"dtype": torch.bfloat16}
        judged = Judged(Teacher(SD3Transformer2DModel(**SD35_LARGE).to(torch.bfloat16)))
        noised = torch.empty(1, 16, 128, 128, **half, requires_grad=True)
        text = {"context": torch.empty(1, text_tokens, 4096, **half), "pooled": torch.empty(1, 2048, **half)}
        judging = saved_bytes(judged, x=noised, sigma=torch.empty(1), **text)
        heads = count_parameters(judged.judge)
    student, teacher = costs["student_macs"], costs["teacher_macs"]
    way = (1 - 1 / NOISED_EVERY) * (STEPS - 1) / 2 * student  # 0 to STEPS - 1 steps of its own, none where data are noised
    turns = {"heads_turn": way + student + 2 * teacher, "students_turn": way + 3 * student + 3 * teacher}
    return {
        "heads_parameters": heads,
        **{f"{turn}_macs": macs for turn, macs in turns.items()},
        **{f"{turn}_seconds": 2 * macs / FLOPS for turn, macs in turns.items()},
        "state_bytes": 4 * 5 * (costs["student_parameters"] + heads) + 2 * (costs["teacher_parameters"] + sum(TEXT_ENCODERS.values())),
        "activation_bytes": costs["task_activation_bytes"] + judging,
    }
