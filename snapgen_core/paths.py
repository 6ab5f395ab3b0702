"""Where things lie: data, notebooks, shipped checkpoints, caches and results."""

import os
from pathlib import Path

from .errors import UserError


def home() -> Path:
    """The repository's root, or the folder that SNAPGEN_HOME names (it holds `data/` and `exports/`)."""
    named = os.environ.get("SNAPGEN_HOME")
    # Absolute, because notebooks run in another working directory than the command that starts them.
    return Path(named).expanduser().resolve() if named else Path(__file__).resolve().parents[1]


def data_dir() -> Path:
    """Folder of everything shipped. Raises UserError where there is none (a package installed without its clone)."""
    folder = home() / "data"
    if not folder.is_dir():
        raise UserError(f"no data folder at {folder}: run from a clone of the repository or set SNAPGEN_HOME to one")
    return folder


def checkpoint_dir(scale: str) -> Path:
    """Shipped weights of one scale, a folder a model."""
    return data_dir() / "checkpoints" / scale


def cache_dir(scale: str) -> Path:
    """Latents and embeddings computed once; may be deleted at any time."""
    return data_dir() / "cache" / scale


def notebooks_dir() -> Path:
    """The notebook series."""
    return home() / "notebooks"


def runs_dir() -> Path:
    """What commands write: training runs and executed notebooks; not committed."""
    return home() / "exports" / "runs"


def results_dir() -> Path:
    """What was measured, by which command; committed."""
    return home() / "exports" / "results"
