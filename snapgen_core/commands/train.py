"""`snapgen train`: one stage, in a folder that resumes it."""

import argparse
from pathlib import Path

from ..errors import UserError, reason
from ..paths import runs_dir
from .common import quiet_libraries


def check_run_dir(path: Path) -> Path:
    """Create the run's folder. Raises UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {str(path)!r} as a run folder: {reason(error)}") from None
    return path


def train(args: argparse.Namespace) -> int:
    """Train `args.stage` for its budget and name the weights."""
    run_dir = check_run_dir(args.run_dir or runs_dir() / args.scale / args.stage)
    quiet_libraries(args.scale)

    from accelerate import PartialState

    from .. import train as loop
    from ..stages import build_stage

    stage = build_stage(args.stage, args.scale, args.seed, args.batch, args.rate, data=args.data, perceptual=args.perceptual,
                        teacher=args.teacher, constant=args.constant, student=args.student, mislabel=args.mislabel, stored=args.stored, t5=args.t5, only=args.only, scenes=args.scenes)
    loop.train(stage, run_dir, steps=args.steps, minutes=args.minutes, warm_start=args.warm_start, compile=args.compile, score=not args.no_score)
    if PartialState().is_main_process:
        print(f"weights {run_dir / 'weights'}, log {run_dir / 'log.jsonl'}")
        if args.ship:
            print("shipped " + ", ".join(str(folder) for folder in loop.ship(run_dir)))
    return 0
