"""What several commands share."""

import argparse
import os
import secrets
import sys
from pathlib import Path

from ..errors import UserError, reason
from ..scales import SAMPLING


def note(message: str) -> None:
    """One line that is no error, on stderr."""
    print(f"snapgen: note: {message}", file=sys.stderr)


def check_output(path: Path, suffix: str) -> Path:
    """Find out before any work whether `path` can be written at the end. Returns it; raises UserError."""
    shown = str(path)
    try:
        if path.suffix.lower() != suffix:
            raise UserError(f"the output needs a name that ends in {suffix}, not {shown!r}")
        if path.is_dir():
            raise UserError(f"the output {shown!r} is a folder")
        if not path.parent.is_dir():
            raise UserError(f"the folder {str(path.parent)!r} does not exist")
        path.lstat()
    except FileNotFoundError:
        pass  # a free name: what one hopes for
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise UserError(f"cannot write {shown!r}: {reason(error)}") from None
    probe = Path(os.path.realpath(path)).parent / f".{secrets.token_hex(4)}.part"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {str(path.parent)!r}: {reason(error)}") from None
    return path


def quiet_libraries(scale: str) -> None:
    """Keep the libraries' own bars and warnings off the terminal; at `tiny`, also keep them off the network."""
    if scale == "tiny":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def stage_of(args: argparse.Namespace, default: str) -> str:
    """The stage that is asked for; or what the name of `--checkpoint` says, as in RUN_DIR/weights/base; or `default`."""
    named = args.checkpoint.name if args.checkpoint else None
    return args.stage or (named if named in SAMPLING else default)
