"""The `snapgen` command: reads arguments and hands them to a room of `snapgen_core/commands/`.

Exit codes: 0 done, 1 something failed while running, 2 wrong input (one line on stderr), 130 interrupted.
Nothing heavy is imported before the arguments are read, so that --help and a wrong argument answer at once.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

from .errors import UserError
from .scales import PICTURE_DECODERS, PICTURE_STAGES
from .threads import cap_threads

TRAIN_STAGES = ("autoencoder", "decoder", "decoder_norms", "photo_autoencoder", "photo_decoder", "text", "detector", "base", "teacher", "kd", "turbo", "distilled", "ablation")
BENCHMARKS = ("unet", "chain", "decoder", "kd", "steps", "export")
LONGEST_LINE = 300


# ---------------------------------------------------------------------------
# Values, checked at the door


def _levels(text: str) -> tuple[float, float]:
    """An argparse type: two noise levels, the lower one first."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} are not two noise levels from 0 to 1, the lower one first, such as 0.7,0.85")
    return low, high


def _number(kind: type, lowest: float, highest: float, unit: str = ""):
    """An argparse type: a finite number of `kind` from `lowest` to `highest`."""
    noun = "a whole number" if kind is int else "a number"

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:  # false for nan too
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} from {lowest} to {highest}{unit}")
        return value

    return read


_steps = _number(int, 1, 1000)
_seed = _number(int, 0, 2**63 - 1)


# ---------------------------------------------------------------------------
# The parser


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of a usage block."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def _add(commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--scale", default="tiny", metavar="{tiny,small,paper}", help="size of every model (default: tiny)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="start of all random numbers (default: 0)")
    return parser


def _add_sampling(parser: argparse.ArgumentParser, stage: str, others: tuple[str, ...] = ()) -> None:
    parser.add_argument("--stage", choices=PICTURE_STAGES + others, help=f"which model draws (default: what --checkpoint's name says, or {stage})")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER",
                        help="a student in place of the shipped one, such as RUN_DIR/weights/base of a training")
    parser.add_argument("--decoder", choices=PICTURE_DECODERS, default="full", help="what turns its latents into pictures: the autoencoder's own decoder or the tiny one (default: full)")
    parser.add_argument("--steps", type=_steps, metavar="N", help="sampling steps, 1 to 1000 (default: 4 for stage distilled, 28 for others)")
    parser.add_argument("--guidance", type=_number(float, 0, 30), metavar="G",
                        help="how strongly the prompt pulls, 0 to 30; 1 is no guidance (default: 1 for stage distilled, 4 for others)")


def _add_run(commands) -> None:
    run = _add(commands, "run", "run the notebooks and keep the executed copies",
               "  snapgen run\n"
               "  snapgen run 03\n"
               "  snapgen run 03_flow_matching -p TRAIN full --scale small")
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="name, number or file (default: the whole series)")
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="set a notebook's parameter; may be repeated")


def _add_train(commands) -> None:
    train = _add(commands, "train", "train one stage; the same run folder again resumes it",
                 "  snapgen train base --minutes 30\n"
                 "  snapgen train text --steps 2000 --run-dir runs/text --ship")
    train.add_argument("stage", choices=TRAIN_STAGES, metavar="STAGE", help=", ".join(TRAIN_STAGES))
    budget = train.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_number(int, 1, 10**9), metavar="N",
                        help="train until this step, resumed ones included (default: the stage's own)")
    budget.add_argument("--minutes", type=_number(float, 0.01, 10**6), metavar="M", help="train for this long")
    train.add_argument("--run-dir", type=Path, metavar="DIR",
                       help="checkpoints and log (default: exports/runs/SCALE/STAGE)")
    train.add_argument("--batch", type=_number(int, 4, 10**6), metavar="N", help="samples a step, over all processes (default: the stage's own)")
    train.add_argument("--rate", type=_number(float, 1e-9, 1), metavar="R", help="learning rate (default: the stage's own)")
    train.add_argument("--scenes", type=_number(int, 1, 10**9), metavar="N", help="learn from the first N scenes (stage teacher only; default: 65536)")
    train.add_argument("--data", type=Path, metavar="FOLDER",
                       help="pictures to learn from, as files or in WebDataset shards (stage decoder only)")
    train.add_argument("--perceptual", metavar="{lite0,lpips}",
                       help="what the perceptual loss looks through (stage decoder only; default: lite0 at tiny, or else lpips)")
    train.add_argument("--teacher", type=Path, metavar="FOLDER",
                       help="a teacher in place of the scale's own: a twin of RUN_DIR/weights/teacher, or from small on an SD3.5 pipeline (stages kd and distilled)")
    train.add_argument("--constant", metavar="L1,L2",
                       help="the constant weights of Eq. 6 in place of timestep-aware scaling; 0,0 trains without a teacher (stage kd only)")
    train.add_argument("--student", type=Path, metavar="FOLDER", help="begin with this student, such as RUN_DIR/weights/base, and not with the shipped base student (stage kd only)")
    train.add_argument("--mislabel", type=_number(float, 0, 1), metavar="SHARE", help="give this share of the scenes another scene's caption, as in data from the web (stage kd only)")
    train.add_argument("--stored", type=_number(int, 1, 10**9), metavar="N",
                       help="keep the teacher's answers to the first N batches on disk and go round these (stage kd only)")
    train.add_argument("--t5", choices=("yes", "no"), help="whether SD3.5 reads with its T5, too, 10 GB of memory (stages kd and distilled; default: yes, where it is at hand)")
    train.add_argument("--only", choices=("adversarial", "kd"), help="leave out the other half of Eq. 9 (stage distilled only)")
    train.add_argument("--warm-start", action="store_true",
                       help="begin with the shipped weights (a run that resumes goes on with its own)")
    train.add_argument("--compile", action="store_true",
                       help="let torch fuse the network's kernels: a minute or two at the start, then faster steps (the teacher's 1.5 times); needs a C++ compiler")
    train.add_argument("--no-score", action="store_true", help="do not score the final weights, which can take minutes; `snapgen evaluate` can do it later")
    train.add_argument("--ship", action="store_true", help="put the final weights among the shipped checkpoints")


def _add_generate(commands) -> None:
    generate = _add(commands, "generate", "draw a picture from words",
                    '  snapgen generate "a red car left of a dog" --out car.png\n'
                    '  snapgen generate "three green apples" --num 4 --seed 7 --steps 8')
    generate.add_argument("prompt", metavar="PROMPT", help="what to draw, in English")
    generate.add_argument("--out", type=Path, default=Path("snapgen.png"), metavar="FILE.png",
                          help="where to put it; replaces what is there (default: snapgen.png)")
    generate.add_argument("--num", type=_number(int, 1, 64), default=1, metavar="K",
                          help="draw K pictures, 1 to 64, with seeds S, S+1, ..., as FILE-1.png, FILE-2.png, ...")
    _add_sampling(generate, "distilled")


def _add_evaluate(commands) -> None:
    evaluate = _add(commands, "evaluate", "score a student with SceneEval",
                    "  snapgen evaluate\n"
                    "  snapgen evaluate --steps 8 --json exports/results/base-8-steps.json")
    evaluate.add_argument("--images", type=_number(int, 2, 10**5), default=20, metavar="N",
                          help="pictures for each of the six tasks, and half as many for each of the four held-out "
                               "ones; at least 2 (default: 20)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file, and which pictures were right")
    evaluate.add_argument("--bits", type=_number(float, 4, 16), metavar="B", help="score the student with its weights in so many bits on average, 4 to 8, as on a phone; 16 rounds them")
    evaluate.add_argument("--relay", type=_levels, metavar="LOW,HIGH", help="at noise levels above LOW and up to HIGH, of 0 to 1, let the teacher answer in the student's place: what is its lead worth there?")
    evaluate.add_argument("--variety", action="store_true", help="also measure how varied the pictures of a prompt are, and how far they are from true scenes")
    _add_sampling(evaluate, "base", others=("teacher", "turbo"))


def _add_prepare(commands) -> None:
    prepare = _add(commands, "prepare", "compute the training scenes' latents and text embeddings ahead of training",
                   "  snapgen prepare\n"
                   "  snapgen prepare --images 8192")
    prepare.add_argument("--images", type=_number(int, 1, 10**9), metavar="N",
                         help="the first N scenes, in steps of 4,096 (default: all that stage base trains on)")


def _add_export(commands) -> None:
    export = _add(commands, "export", "write a model as Core ML packages, for a phone",
                  "  snapgen export --verify\n"
                  "  snapgen export --stage kd --bits 4.3 --target iOS17 --out phone")
    export.add_argument("--stage", choices=PICTURE_STAGES, help="which model (default: what --checkpoint's name says, or distilled)")
    export.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a student in place of the shipped one, such as RUN_DIR/weights/base of a training")
    export.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder; replaces a bundle that is there (default: exports/coreml/SCALE-STAGE)")
    export.add_argument("--target", choices=("iOS17", "iOS18"), default="iOS18", help="oldest system that is to run it (default: iOS18)")
    export.add_argument("--bits", type=_number(float, 4, 8), metavar="B", help="store the denoiser's weights in so many bits on average, 4 to 8, as SnapGen++ does with 4.3 (default: 16, no palettes)")
    export.add_argument("--core-ai", action="store_true", help="also write each part as an asset for Apple's newer Core AI, which --verify runs with Apple's own runtime; needs the extra coreai")
    export.add_argument("--json", type=Path, metavar="FILE", help="also write the manifest to this file, with what --verify measured")
    export.add_argument("--verify", action="store_true", help="run every package with torch, on any machine, and hold it against the model; below 35 dB it fails")


def _add_demo(commands) -> None:
    demo = _add(commands, "demo", "serve the studio of notebook 08 to browsers of this machine",
                "  snapgen demo\n"
                "  snapgen demo --port 9000 --theme dark")
    demo.add_argument("--port", type=_number(int, 1, 65535), default=8866, metavar="P", help="where it listens, on localhost alone (default: 8866)")
    demo.add_argument("--visitors", type=_number(int, 1, 1000), default=12, metavar="N", help="how many at once; who comes later is told to wait (default: 12)")
    demo.add_argument("--theme", choices=("light", "dark"), default="light", help="colours of the page (default: light)")


def _add_bench(commands) -> None:
    bench = _add(commands, "bench", "time a network beside those that one might take instead",
                 "  snapgen bench unet --only ours --only dreamlite\n"
                 "  snapgen bench unet --json exports/results/bench-unet.json")
    bench.add_argument("what", choices=BENCHMARKS, metavar="WHAT", help="unet or decoder (ours and its peers) or chain (the steps of Fig. 3), at the paper's size; kd (training steps with and without a teacher, at --scale); steps (a picture in few steps beside one in many, at --scale); export (the paper's networks as packages for a phone)")
    bench.add_argument("--only", action="append", metavar="NAME",
                       help="measure this model alone; may be repeated (a wrong name lists the choices)")
    bench.add_argument("--runs", type=_number(int, 1, 1000), default=3, metavar="N", help="timed passes of each (default: 3)")
    bench.add_argument("--teacher", type=Path, metavar="FOLDER", help="kd: a teacher in place of the scale's own")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="snapgen",
        description="SnapGen: a small text-to-image model, to read, train and run.",
        epilog='start with:\n  snapgen run\n  snapgen generate "a red car left of a dog" --out car.png',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_run, _add_train, _add_generate, _add_evaluate, _add_prepare, _add_export, _add_demo, _add_bench):
        add(commands)
    _add(commands, "doctor", "check this machine and installation, and say what to do", "  snapgen doctor")
    return parser


# ---------------------------------------------------------------------------
# Dispatch


def _call(args: argparse.Namespace) -> int:
    from .scales import get_scale

    get_scale(args.scale)  # raises UserError, naming the choices
    if args.command == "run":
        from .commands.run import run as command
    elif args.command == "train":
        from .commands.train import train as command
    elif args.command == "generate":
        from .commands.generate import generate as command
    elif args.command == "evaluate":
        from .commands.evaluate import evaluate as command
    elif args.command == "prepare":
        from .commands.prepare import prepare as command
    elif args.command == "export":
        from .commands.export import export as command
    elif args.command == "demo":
        from .commands.demo import demo as command
    elif args.command == "bench":
        from .commands.bench import bench as command
    else:
        from .commands.doctor import doctor as command
    return command(args)


def _one_line(message: str) -> str:
    """`message` on a single line, shortened in the middle where it is long, control characters spelt out."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > LONGEST_LINE:
        line = line[: LONGEST_LINE // 2] + " ... " + line[-LONGEST_LINE // 2 :]
    return line


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to the process's arguments."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal cannot show
    cap_threads()
    try:
        args = build_parser().parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else argv  # a result names the command that made it
        return _call(args)
    except UserError as error:
        print(f"snapgen: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("snapgen_core"):
            raise
        print(f"snapgen: the package {error.name} is missing (see: snapgen doctor)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"snapgen: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as in `snapgen doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
