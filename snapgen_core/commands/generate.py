"""`snapgen generate`: pictures from words."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..files import atomic_write
from .common import check_output, note, quiet_libraries, stage_of

SHOWN_OF_A_PROMPT = 60


def check_prompt(prompt: str) -> str:
    """The prompt without outer blanks. Raises UserError where nothing is left or it is not text."""
    prompt = prompt.strip()
    if not prompt:
        raise UserError('the prompt is empty: say what to draw, for example "a red car left of a dog"')
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes in the command line that are no UTF-8
        raise UserError("the prompt is not valid UTF-8 text") from None
    return prompt


def output_names(out: Path, num: int) -> list[Path]:
    """`out` itself for one picture, FILE-1.png, FILE-2.png, ... for several; each checked to be writable."""
    names = [out] if num == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(num)]
    return [check_output(name, ".png") for name in names]


def save_png(image: Any, path: Path, facts: dict[str, Any]) -> None:
    """Write a PIL image with `facts` as PNG text, so that the picture tells how to draw it again."""
    from ..figures import to_png

    try:
        with atomic_write(path) as part:
            part.write_bytes(to_png(image, facts))
    except OSError as error:  # the disk filled up while the picture was drawn
        raise UserError(f"cannot write {str(path)!r}: {reason(error)}") from None


def generate(args: argparse.Namespace) -> int:
    """Draw `args.num` pictures, each from its own seed, so that any of them can be drawn again alone."""
    prompt = check_prompt(args.prompt)
    names = output_names(args.out, args.num)
    quiet_libraries(args.scale)

    import torch
    from tqdm import tqdm

    from .. import load

    stage = stage_of(args, "distilled")
    pipe = load(args.scale, stage, args.checkpoint, args.decoder)
    steps = pipe.config.steps if args.steps is None else args.steps
    guidance = pipe.config.guidance if args.guidance is None else args.guidance
    if torch.cuda.is_available():
        pipe.to("cuda")
    unread = pipe.text.truncated(prompt)
    if unread:
        shown = unread if len(unread) <= SHOWN_OF_A_PROMPT else unread[:SHOWN_OF_A_PROMPT] + "..."
        note(f"the prompt is longer than the text encoders read; its last {len(unread)} characters are cut: {shown!r}")

    # disable=None: a bar on a terminal only
    for i, name in enumerate(tqdm(names, desc="drawing", unit="picture", disable=None, leave=False)):
        seed = args.seed + i
        image = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        facts = {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance}
        save_png(image, name, {**facts, "stage": stage, "decoder": args.decoder, "scale": args.scale, "software": "snapgen"})
    seeds = f"seed {args.seed}" if args.num == 1 else f"seeds {args.seed} to {args.seed + args.num - 1}"
    written = str(names[0]) if args.num == 1 else f"{args.num} pictures, {names[0]} to {names[-1].name}"
    print(f"{written}: {image.width} px, {steps} steps, guidance {guidance:g}, {seeds}")
    return 0
