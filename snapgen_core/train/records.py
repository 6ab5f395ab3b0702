"""What a training tells afterwards: its log, where its weights come from, and their card."""

import json
import shutil
from pathlib import Path

import torch

from ..errors import UserError
from ..files import atomic_folder, atomic_write, read_jsonl, write_json
from ..paths import checkpoint_dir
from .stage import Stage


def trainings(result: dict) -> list[dict]:
    """The trainings that led to `result`, the content of a checkpoint's `training.json`: the first one first."""
    runs = [result]
    while runs[0]["origin"]:
        runs.insert(0, runs[0]["origin"])
    return runs


def shipped_origin(stage: Stage) -> dict:
    """How the shipped weights were made."""
    path = checkpoint_dir(stage.scale) / stage.name / "training.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"nothing to start warm from: no readable {path}") from None


def training_of(weights: Path) -> dict:
    """Which training made the weights in `weights`, in brief: told by the card of shipped ones, or by the run of RUN_DIR/weights/NAME.
    Empty where nothing tells."""
    for path in (weights / "training.json", weights.parent.parent / "result.json"):
        try:
            told = json.loads(path.read_text("utf-8"))
            return {name: told[name] for name in ("command", "commit", "steps", "samples", "minutes", "device")}
        except (OSError, ValueError, KeyError):
            continue
    return {}


def trim_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`: they were written between the last checkpoint and the kill."""
    if path.exists():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), "utf-8")


def loss_curve(log: Path, points: int = 20) -> list[float]:
    """The run in brief: the mean loss of each of (at most) `points` equal stretches of it; the task's, where it is logged."""
    losses = torch.tensor([line.get("task", line["loss"]) for line in read_jsonl(log)], dtype=torch.float64)
    return [round(part.mean().item(), 5) for part in losses.tensor_split(min(points, len(losses)))]


def history(result: dict) -> list[tuple[float, float]]:
    """How shipped weights came to be: (samples seen, mean loss there) through all trainings that led to `result`."""
    curve, before = [], 0
    for run in trainings(result):
        losses = run.get("losses", [])
        curve += [(before + (i + 0.5) * run["samples"] / len(losses), loss) for i, loss in enumerate(losses)]
        before += run["samples"]
    return curve


def ship(run_dir: Path) -> list[Path]:
    """Put a finished run's weights, each folder with a card, into data/checkpoints/<scale>; returns the folders."""
    result = json.loads((run_dir / "result.json").read_text("utf-8"))
    shipped = []
    for folder in sorted((run_dir / "weights").iterdir()):
        target = checkpoint_dir(result["scale"]) / folder.name
        with atomic_folder(target) as part:
            shutil.copytree(folder, part, dirs_exist_ok=True)
            write_json(part / "training.json", result)
            (part / "CARD.md").write_text(card(folder.name, result), "utf-8")
        shipped.append(target)
    return shipped


def card(title: str, result: dict) -> str:
    """A checkpoint's card: how it was made and what it scores; `training.json` beside it says the same to programs."""
    keys = ("command", "commit", "seed", "steps", "samples", "minutes", "device")
    lines = [f"# {title} ({result['scale']})", "", "| made by | |", "|---|---|", *(f"| {key} | `{result[key]}` |" for key in keys)]
    for run in reversed(trainings(result)[:-1]):
        lines.append(f"| before that | `{run['command']}`, {run['samples']} samples, {run['minutes']} minutes, {run['device']} |")
    lines += ["", "| scores | |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in result["scores"].items()), ""]
    return "\n".join(lines)
