"""`snapgen evaluate`: SceneEval of a student, as a table and as JSON."""

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..files import git_commit, now, write_json
from .common import check_output, quiet_libraries, stage_of


def rows(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every figure; a score with an interval is one row: 0.61 [0.52, 0.70] n=120. Single outcomes are for
    the file."""
    for name, value in figures.items():
        label = f"{prefix}{name}"
        if isinstance(value, dict) and {"score", "low", "high"} <= value.keys():
            count = f" n={value['n']}" if "n" in value else ""
            yield label, f"{value['score']:.2f} [{value['low']:.2f}, {value['high']:.2f}]{count}"
        elif isinstance(value, dict) and name != "outcomes":
            yield from rows(value, f"{label}.")
        elif name != "outcomes":
            yield label, f"{value:.4g}" if isinstance(value, float) else str(value)


def evaluate(args: argparse.Namespace) -> int:
    """Draw, judge, print the table and write it if asked."""
    if args.json:
        check_output(args.json, ".json")
    stage = stage_of(args, "base")
    if args.bits and stage in ("teacher", "turbo"):
        raise UserError(f"--bits squeezes a student for a phone, not the {stage}")
    if args.relay and stage in ("teacher", "turbo"):
        raise UserError(f"--relay puts the teacher in a student's place, not in the {stage}'s")
    quiet_libraries(args.scale)

    from .. import evaluate as scoring
    from ..train.records import training_of

    figures = scoring.evaluate_stage(args.scale, stage, args.images, args.seed, args.steps, args.guidance, args.checkpoint, args.decoder, args.variety, args.bits, args.relay)
    table = list(rows(figures))
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}}  {value}")
    if args.json:
        command = shlex.join(["snapgen", *args.argv])
        training = {"training": training_of(args.checkpoint)} if args.checkpoint else {}
        write_json(args.json, {"command": command, "commit": git_commit(), "date": now(), **training, **figures})
    return 0
