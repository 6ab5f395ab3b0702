"""Checkers of the notebooks' exercises: each says what is wrong with an answer and where to look, or that it is right."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from . import flow
from .decoder import TinyDecoder
from .detector import Detection
from .evaluate import judge, near_misses, true_detections
from .profile import count_macs, count_parameters
from .scales import DECODER_PRESETS, UNET_PRESETS, DecoderPreset, UNetPreset
from .scenes import COLOURS, Prompt, draw_scene
from .text import fuse
from .unet import SnapGenUNet
from .unet.attention import AttentionOptions, TransformerLayer
from .unet.blocks import conv3x3


@dataclass(frozen=True)
class Verdict:
    """What a checker found; true if the answer is right. A notebook shows it as one line."""

    right: bool
    message: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.message}"


_UNANSWERED = Verdict(False, "no answer so far. Replace the three dots and run the cell again.")


def _wrong(message: str) -> Verdict:
    return Verdict(False, message)


def _right(message: str) -> Verdict:
    return Verdict(True, message)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def _call(answer: Callable, *arguments) -> tuple[object, Verdict | None]:
    """(what `answer` returns, None), or (None, a verdict) where it is unfinished or fails."""
    try:
        value = answer(*arguments)
    except Exception as error:  # a learner's function may fail in any way: that is a wrong answer, not a crash here
        return None, _wrong(f"your function stopped with {type(error).__name__}: {error}")
    return value, _UNANSWERED if value is None or value is ... else None


# ------------------------------------------------------------------------------------------------- 01 efficient UNet


def check_separable(answer: Callable[[int, int], int]) -> Verdict:
    """01, exercise 1: answer(c_in, c_out) is the number of parameters of a separable 3x3 convolution."""
    for c_in, c_out in ((8, 8), (16, 48), (320, 640)):
        value, failed = _call(answer, c_in, c_out)
        if failed is not None:
            return failed
        expected = count_parameters(conv3x3(c_in, c_out, separable=True))
        if value != expected:
            hints = {
                9 * c_in * c_out + c_out: " That is a dense one.",
                9 * c_in * c_out: " That is a dense one, without its bias.",
                9 * c_in + c_in * c_out: " The pointwise half has a bias, one number for each output channel.",
                9 * c_in + c_in + c_in * c_out + c_out: " The depthwise half has no bias: the pointwise one would only add another constant to it.",
                9 * c_out + c_in * c_out + c_out: " The depthwise half comes first: it works on the input's channels.",
            }
            return _wrong(f"from {c_in} to {c_out} channels it is not {value}.{hints.get(value, '')}")
    return _right("for many channels nearly all of it is the pointwise matrix, a ninth of a dense convolution.")


def check_layer_macs(answer: Callable[[int, int, int, int, int], int]) -> Verdict:
    """01, exercise 2: answer(S, C, L, D, E) counts a transformer layer with cross-attention and GEGLU of ratio 3."""
    for S, C, L, D, E in ((100, 64, 7, 48, 16), (64, 96, 48, 384, 32), (16384, 256, 154, 2304, 64)):
        value, failed = _call(answer, S, C, L, D, E)
        if failed is not None:
            return failed
        with torch.device("meta"):
            layer = TransformerLayer(C, False, AttentionOptions(D, E, 1, 3, True, None, 8))
            expected = count_macs(layer, torch.empty(1, S, C), torch.empty(1, L, D), None)
        if value != expected:
            keys_and_values, products, feed_forward = 2 * L * D * E, 2 * S * L * C, 9 * S * C * C
            hints = {
                expected - keys_and_values: " Keys and values are missing: two matrices of D x E for each text token.",
                expected - keys_and_values + 2 * L * D * C: " With one key and value for all heads, they have E channels and not C.",
                expected - products: " The products are missing: queries with keys, and weights with values.",
                expected - products // 2: " There are two products: queries with keys, and weights with values.",
                expected - products + 2 * S * S * C: " The image looks at L text tokens here, not at itself.",
                expected - S * C * C: " The output of the attention passes a C x C projection, too.",
                expected - 3 * S * C * C: " GEGLU's first projection is twice as wide: one half gates the other.",
                expected - feed_forward: " The feed-forward layer is missing.",
            }
            return _wrong(f"for S={S}, C={C}, L={L}, D={D}, E={E} the counter finds another number than {value}.{hints.get(value, '')}")
    return _right("and that is what the counter of this notebook finds. Keys and values hardly matter; S does, everywhere.")


def check_design(design: UNetPreset) -> Verdict:
    """01, exercise 3: a text-to-image UNet of 180 to 220 M parameters and at most 340 GMACs at 128x128, no step undone."""
    if not isinstance(design, UNetPreset):
        return _wrong("give a preset: replace(UNET_PRESETS['paper'], channels=..., ...).")
    free = {"channels", "transformer_depth", "ffn_ratio", "expansion", "layers_per_block", "time_embed_dim"}
    for name, value in asdict(UNET_PRESETS["paper"]).items():
        if name not in free and getattr(design, name) != value:
            return _wrong(f"{name} must stay {value}: the steps of this notebook, and what goes in and out, are kept.")
    if design.ffn_ratio > 3 or design.expansion < 2:
        return _wrong("a wider feed-forward layer undoes step (d), a smaller expansion step (c).")
    if len(design.channels) != 3 or not all(design.transformer_depth):
        return _wrong("three stages, please, each with transformers: the text comes in from the first one on.")
    try:
        with torch.device("meta"):
            unet = SnapGenUNet(**asdict(design))
            parameters = count_parameters(unet) / 1e6
            macs = count_macs(unet, torch.empty(1, 16, 128, 128), torch.empty(1), torch.empty(1, 154, 2304)) / 1e9
    except (ValueError, TypeError, RuntimeError) as error:
        return _wrong(f"it cannot be built: {error}")
    found = f"it has {parameters:.0f} M parameters and {macs:.0f} GMACs"
    if macs > 340:
        return _wrong(f"{found}: too much to compute. Where do the MACs sit?")
    if parameters > 220:
        return _wrong(f"{found}: too much to store. Where do the parameters sit?")
    if parameters < 180:
        return _wrong(f"{found}: smaller than asked. The phone has room for 180 M at least.")
    return _right(f"{found}. Whether it draws as well, only training will tell.")


# ------------------------------------------------------------------------------------------------- 03 flow matching


def check_endpoints(answer: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Verdict:
    """03, exercise 1: answer(x_t [B, D], v [B, D], sigma [B]) gives (x0, eps), both [B, D]."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=generator)
    sigma = torch.linspace(0.1, 0.9, 5)
    x_t, v = flow.interpolate(x0, eps, sigma), flow.velocity(x0, eps)
    value, failed = _call(answer, x_t, v, sigma)
    if failed is not None:
        return failed
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)):
        return _wrong("return two tensors, x0 and eps, in this order.")
    if any(part.shape != x0.shape for part in value):
        return _wrong(f"both must have x_t's shape {list(x0.shape)}, yours have {[list(part.shape) for part in value]}. sigma is [B]: write sigma[:, None].")
    first, second = value
    if _close(first, eps) and _close(second, x0):
        return _wrong("both are found, but x0 comes first.")
    if not _close(first, x0):
        if _close(first, x_t + sigma[:, None] * v):
            return _wrong("x0: v points from the data to the noise, so against v you reach the data. Look at the sign.")
        if _close(first, x_t - (1 - sigma[:, None]) * v):
            return _wrong("x0: how far is it from x_t to the data? At sigma = 0 you are there already.")
        return _wrong("x0 is not right. Walk from x_t at constant velocity v until the noise level is 0.")
    if not _close(second, eps):
        if _close(second, x_t + sigma[:, None] * v):
            return _wrong("x0 is right. eps: the noise lies at sigma = 1. How far is that from where you stand?")
        return _wrong("x0 is right, eps is not. It lies at the path's other end, at sigma = 1.")
    return _right("one prediction, three readings. v, x0 and eps tell the same once x_t is known.")


def check_share_above(answer: float) -> Verdict:
    """03, exercise 2: which share of the training levels (logit-normal, shift 3) lies above 0.9?"""
    if answer is None or answer is ...:
        return _UNANSWERED
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return _wrong("a number between 0 and 1, please.")

    def tail(z: float) -> float:
        return 0.5 * math.erfc(z / math.sqrt(2))

    level, shift = math.log(0.9 / 0.1), math.log(3)
    if not 0 <= value <= 1:
        return _wrong("a share lies between 0 and 1.")
    if abs(value - tail(level - shift)) < 0.004:
        return _right("the shift moves the bell by log 3 in log-odds, so the question is how often a normal number exceeds log 9 - log 3.")
    if abs(value - tail(level)) < 0.004:
        return _wrong("that is the share without the shift. Which u becomes 0.9?")
    if abs(value - tail(level + shift)) < 0.002:
        return _wrong("you moved the bell the wrong way: the shift makes levels noisier, not cleaner.")
    if abs(value - (1 - tail(level - shift))) < 0.004:
        return _wrong("that is the share below 0.9.")
    if abs(value - 0.25) < 0.004:
        return _wrong("that would be so for u drawn evenly from 0 to 1. Here logit(u) is a normal number.")
    return _wrong("not this. Which u does the shift turn into 0.9, and how often does a normal number exceed logit(u)?")


def check_heun(answer: Callable[[Callable, Tensor, Tensor], Tensor]) -> Verdict:
    """03, exercise 3: answer(model, noise, sigmas) is Heun's second-order sampler; model(x, sigma) is a velocity."""
    target, noise = torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    value, failed = _call(answer, lambda x, sigma: noise - target, noise, flow.inference_sigmas(3).double())
    if failed is not None:
        return failed
    if not isinstance(value, Tensor) or value.shape != noise.shape:
        return _wrong(f"return the sample, a tensor of the noise's shape {list(noise.shape)}.")
    if not torch.allclose(value, target, atol=1e-6):
        return _wrong("on a straight path, where v is constant, one must land on the data exactly; yours does not. Does the step average the two velocities (half of their sum), and does it go all the way to the last sigma?")

    calls = []

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
        """The exact velocity of data N(2, 0.5^2)."""
        calls.append(float(sigma))
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        return -2 + (sigma - (1 - sigma) * 0.25) / variance * (x - (1 - sigma) * 2)

    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 2 + 0.5 * start  # where the exact flow carries each point
    errors = []
    for steps in (32, 64):
        calls.clear()
        sample, failed = _call(answer, gaussian, start, flow.inference_sigmas(steps, shift=1.0).double())
        if failed is not None:
            return failed
        errors.append((sample - exact).abs().mean().item())
    if errors[1] > 2e-3:
        hint = "is the second velocity taken at the Euler point, with sigma_next?" if len(calls) > 64 else "that is as far off as Euler. Heun asks the model twice a step."
        return _wrong(f"it works on straight paths, but on curved ones the error is still large: {hint}")
    if errors[0] / errors[1] < 3.2:
        return _wrong("twice as many steps should leave about a quarter of the error; yours falls more slowly. Is the second velocity taken at the Euler point with sigma_next, and does the final step start from x again, not from the Euler point?")
    if len(calls) > 128:
        return _wrong(f"right in its numbers, but it asked the model {len(calls)} times in 64 steps; two times a step are enough.")
    return _right("second order: twice the steps, a quarter of the error, at two model calls a step.")


# ------------------------------------------------------------------------------------------------- 02 tiny decoder


def check_residual(answer: Callable[[int], int]) -> Verdict:
    """02, exercise 1: answer(c) is the parameter count of a separable residual block of c channels without norms."""
    for c in (24, 96, 256):
        value, failed = _call(answer, c)
        if failed is not None:
            return failed
        if value != 2 * (9 * c + c * c + c):
            hints = {
                9 * c + c * c + c: "that is one of its two convolutions.",
                2 * (9 * c * c + c): "that is a block of dense convolutions.",
                2 * (9 * c + c * c): "the pointwise convolutions have a bias.",
                2 * (9 * c + c + c * c + c): "the depthwise convolutions have no bias.",
            }
            return _wrong(hints.get(value, f"for {c} channels it is not {value}. Nine weights a channel, then a matrix and a bias; twice."))
    return _right("almost all of it is in the two matrices; the depthwise filters cost next to nothing.")


def check_reach(answer: Callable[[int], int]) -> Verdict:
    """02, exercise 2: answer(blocks) is how many input rows above its own a row of a stage's output can see."""
    for blocks in (0, 1, 2, 3):
        value, failed = _call(answer, blocks)
        if failed is not None:
            return failed
        convolutions = 1 + 2 * blocks
        if value != -(-convolutions // 2):
            if value == convolutions:
                return _wrong(f"with {blocks} blocks it sees {convolutions} rows of the doubled picture. How many of the input are that?")
            if value == convolutions // 2:
                return _wrong("half a row more is needed, and a band can only be given whole rows.")
            if value == blocks or value == 2 * blocks:
                return _wrong("the upsampling layer convolves, too.")
            return _wrong(f"with {blocks} blocks it is not {value}. Count the 3x3 convolutions; each sees one row further, at the doubled size.")
    return _right("so two blocks need three rows more at each end, whatever the size of the picture.")


def check_decoder_design(design: DecoderPreset) -> Verdict:
    """02, exercise 3: a decoder of at most 1 M parameters and 100 to 150 GMACs at 128x128, with the paper's changes kept."""
    if not isinstance(design, DecoderPreset):
        return _wrong('start from replace(DECODER_PRESETS["paper"], ...).')
    kept = replace(design, channels=(), blocks=())
    if kept != replace(DECODER_PRESETS["paper"], channels=(), blocks=()):
        return _wrong("change channels and blocks only.")
    try:
        with torch.device("meta"):
            decoder = TinyDecoder(**asdict(design))
            parameters, macs = count_parameters(decoder) / 1e6, count_macs(decoder, torch.empty(1, 16, 128, 128)) / 1e9
    except (ValueError, TypeError, RuntimeError) as error:
        return _wrong(f"this is no decoder: {error}")
    if len(design.channels) != 4:
        return _wrong(f"{len(design.channels)} stages make a picture {2 ** (len(design.channels) - 1)} times the latent's size; it takes four for eight times.")
    counted = f"{parameters:.2f} M parameters, {macs:.0f} GMACs"
    if parameters > 1:
        return _wrong(f"{counted}: too many parameters. The coarsest stages hold most of them.")
    if not 100 <= macs <= 150:
        return _wrong(f"{counted}: too {'many' if macs > 150 else 'few'} MACs. They are mostly in the upsampling layers of the finest stages.")
    return _right(f"{counted}.")


# ------------------------------------------------------------------------------------------------- 00 start here


def check_numbers(answer: Callable[[int], tuple[int, int]]) -> Verdict:
    """00, exercise 1: answer(image_size) counts the numbers in a square picture and in its latent (f = 8, 16 channels)."""
    for size in (64, 256, 1024):
        value, failed = _call(answer, size)
        if failed is not None:
            return failed
        if not isinstance(value, tuple) or len(value) != 2 or ... in value:
            return _wrong("return two numbers: those in the picture, then those in the latent.")
        picture, latent = value
        if picture != 3 * size**2:
            hint = " Every pixel has three colours." if picture == size**2 else " Height times width times colours."
            return _wrong(f"a picture of {size} x {size} pixels does not hold {picture} numbers.{hint}")
        if latent != 16 * (size // 8) ** 2:
            hints = {
                (size // 8) ** 2: " Each position of the latent has sixteen channels.",
                16 * size**2: " The latent has fewer positions than the picture has pixels.",
                16 * size**2 // 8: " The factor 8 holds for the height and for the width.",
                3 * (size // 8) ** 2: " The latent's channels are not the three colours: look at the shape printed above.",
            }
            return _wrong(f"the latent of a picture of {size} pixels does not hold {latent} numbers.{hints.get(latent, '')}")
    return _right("a latent is twelve times smaller than its picture, at every size. The denoiser never sees a pixel.")


def check_fusion(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """00, exercise 2: answer(clip_l [B, T, dl], clip_g [B, T, dg], lm [B, S, D]) is the fused context [B, T + S, D]."""
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, lm_tokens, narrow, wide, width in ((2, 4, 6, 3, 5, 12), (1, 5, 5, 4, 4, 8), (3, 7, 2, 6, 2, 11)):
        clip_l = torch.randn(batch, tokens, narrow, generator=generator)
        clip_g = torch.randn(batch, tokens, wide, generator=generator)
        lm = torch.randn(batch, lm_tokens, width, generator=generator)
        value, failed = _call(answer, clip_l.clone(), clip_g.clone(), lm.clone())
        if failed is not None:
            return failed
        expected = fuse(clip_l, clip_g, lm)
        if not isinstance(value, Tensor) or value.shape != expected.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return _wrong(f"from {list(clip_l.shape)}, {list(clip_g.shape)} and {list(lm.shape)} comes {list(expected.shape)}, not {got}.")
        if not torch.equal(value, expected):
            return _wrong(_fusion_hint(value, clip_l, clip_g, lm))
    return _right("the CLIPs share their tokens, the language model brings its own, and zeros fill the rest.")


def _fusion_hint(value: Tensor, clip_l: Tensor, clip_g: Tensor, lm: Tensor) -> str:
    """What is wrong with a context of the right shape."""
    tokens, narrow, wide = clip_l.shape[1], clip_l.shape[2], clip_g.shape[2]
    if torch.equal(value[:, : lm.shape[1]], lm):
        return "the shape is right, but the language model's tokens come after the CLIPs'."
    if not torch.equal(value[:, tokens:], lm):
        return "the language model's part must arrive unchanged, below the CLIPs' tokens."
    clip = value[:, :tokens]
    if torch.equal(clip[..., :wide], clip_g):
        return "the shape is right, but CLIP-L comes before CLIP-G."
    if torch.equal(clip[..., -wide:], clip_g) and clip.shape[2] > narrow + wide:
        return "the zeros come last, after the channels of both CLIPs."
    if torch.equal(clip[..., : narrow + wide], torch.cat([clip_l, clip_g], dim=2)):
        return "the CLIPs' channels are right; what fills the rest of the width must be zeros."
    return "the language model's part is right, the CLIPs' part is not: CLIP-L's channels, then CLIP-G's, then zeros."


def check_judge(answer: Callable[[Prompt, list[Detection]], bool]) -> Verdict:
    """00, exercise 3: answer(prompt, detections) judges a picture by GenEval's rules, in all tasks but position."""
    for task in ("single_object", "two_object", "counting", "colors", "color_attr"):
        for index in range(8):
            scene = draw_scene(11, index, "seen", task)
            for label, prompt, detections in _judged_cases(scene.prompt, true_detections(scene), near_misses(scene)[:: 1 + index]):
                value, failed = _call(answer, prompt, list(detections))
                if failed is not None:
                    return failed
                if bool(value) != judge(prompt, detections):
                    asked = " and ".join(" ".join(filter(None, (str(w.count), w.colour, w.name))) for w in prompt.wanted)
                    seen = ", ".join(" ".join(filter(None, (d.colour, d.name, f"({d.score:.1f})"))) for d in detections) or "nothing"
                    return _wrong(f"task {task}, asked for {asked}, found {seen}: you say {bool(value)}, the rules say {not value}. {label}")
    return _right("your judge agrees with the library's on every case. Now you know what a SceneEval score means.")


def _judged_cases(prompt: Prompt, truth: Sequence[Detection], wrong: Sequence[Prompt]) -> Iterator[tuple[str, Prompt, list[Detection]]]:
    """(hint, prompt, detections) around one scene: its truth, and what a careless judge stumbles over."""
    truth = list(truth)
    yield "Everything asked for is there.", prompt, truth
    yield "An empty picture shows nothing that was asked for.", prompt, []
    yield "Below 0.3 nothing counts as found.", prompt, [replace(d, score=0.2) for d in truth]
    yield "From 0.3 on an object is found; counting asks for more than 0.5.", prompt, [replace(d, score=0.4) for d in truth]
    for other in wrong:
        yield "Something else was asked for.", other, truth
    first = truth[0]
    colour = next(c for c in COLOURS if c not in {first.colour, *(w.colour for w in prompt.wanted)})
    more = replace(first, colour=colour, score=0.6)
    yield "One object more does harm in counting alone, and of each class the best-scored objects are asked for their colour.", prompt, [more, *truth]
    yield "A faint object more (score 0.4) does no harm, in counting neither.", prompt, [replace(more, score=0.4), *truth]
    if prompt.wanted[0].colour:
        doubted = [replace(first, score=0.7), *truth[1:], replace(more, score=0.9)]
        yield "The best-scored object of the class has another colour: it is the one that counts.", prompt, doubted
