"""Scores with the uncertainty that a few hundred pictures leave."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..scenes import HELD_OUT_TASKS

Outcomes = Mapping[str, Sequence[Sequence[bool]]]  # task -> for each prompt, is each of its pictures right


@dataclass(frozen=True)
class Score:
    """A share of right pictures with its 95% interval, over `n` pictures."""

    score: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.score:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _prompt_means(outcomes: Outcomes) -> list[np.ndarray]:
    """Share of right pictures by prompt, one array a task."""
    means = [np.array([np.mean(pictures) for pictures in prompts], dtype=float) for prompts in outcomes.values()]
    if not means or any(len(m) == 0 for m in means):
        raise ValueError("every task needs at least one judged prompt")
    return means


def bootstrap_interval(
    outcomes: Outcomes, resamples: int = 4000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of the task means.

    Prompts are resampled, within their task: pictures of one prompt succeed and fail together, and the number of
    prompts a task is fixed. Where every picture of a task is right (or wrong), resampling finds no spread: read such
    an interval with n in mind.
    """
    rng = np.random.default_rng(seed)
    means = _prompt_means(outcomes)
    draws = [np.mean([rng.choice(task, len(task)).mean() for task in means]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score(outcomes: Outcomes, seed: int = 0) -> Score:
    """Mean of the task means, as GenEval's overall score, with its interval."""
    low, high = bootstrap_interval(outcomes, seed=seed)
    count = sum(len(pictures) for prompts in outcomes.values() for pictures in prompts)
    return Score(float(np.mean([m.mean() for m in _prompt_means(outcomes)])), low, high, count)


@dataclass(frozen=True)
class Report:
    """SceneEval of one model.

    `overall` is the mean of the six tasks on compositions that training may have shown. `seen` and `held_out` compare
    like with like: the same four tasks (HELD_OUT_TASKS), with pairs of object and colour or object and object that
    training may have shown, and with pairs that it never has. Three held-out colours are close to the sprite's own
    (data/emoji/README.md), most of all the red book: there the words are a new combination, the look is not.
    """

    overall: Score
    tasks: dict[str, Score]
    seen: Score | None = None
    held_out: Score | None = None
    held_out_tasks: dict[str, Score] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)  # of the six tasks: "1" for each right picture, "0" for the others

    @classmethod
    def of(cls, seen: Outcomes, held_out: Outcomes | None = None, seed: int = 0) -> "Report":
        """Score the outcomes of seen and, if there are any, of held-out compositions."""
        pairs = {task: seen[task] for task in HELD_OUT_TASKS if task in seen}
        return cls(
            score(seen, seed),
            {task: score({task: prompts}, seed) for task, prompts in seen.items()},
            score(pairs, seed) if pairs else None,
            score(held_out, seed) if held_out else None,
            {task: score({task: prompts}, seed) for task, prompts in (held_out or {}).items()},
            {task: "".join(str(int(right)) for pictures in prompts for right in pictures) for task, prompts in seen.items()},
        )

    def table(self) -> str:
        """The report as text, one line a score."""
        rows = [("overall", self.overall), *self.tasks.items()]
        rows += [("seen pairs", self.seen)] if self.seen else []
        rows += [("held-out pairs", self.held_out)] if self.held_out else []
        rows += [(f"  held-out {task}", value) for task, value in self.held_out_tasks.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}  n={value.n}" for name, value in rows)

    def to_dict(self) -> dict:
        """The report as plain dicts and numbers, for JSON."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """The scores alone, flat, for a card or a log."""
        flat = {"overall": self.overall.score, **{task: value.score for task, value in self.tasks.items()}}
        pairs = {"seen_pairs": self.seen, "held_out_pairs": self.held_out}
        return flat | {name: value.score for name, value in pairs.items() if value}


def paired_difference(ours: Sequence[Mapping[str, str]], theirs: Sequence[Mapping[str, str]], resamples: int = 4000, seed: int = 0) -> Score:
    """By how much the first runs' overall score exceeds the second's, with its 95% interval.

    Each run is a report's `outcomes`; all runs drew the same prompts, and those at the same place also share what else is
    random (a seed of the training). So what is resampled are differences: of prompts within their task, and of runs. A few runs
    say little about others: look at each of them, too.
    """
    rng = np.random.default_rng(seed)
    tasks = list(ours[0])
    if len(ours) != len(theirs) or any(list(map(len, run.values())) != list(map(len, ours[0].values())) for run in (*ours, *theirs)):
        raise ValueError("the runs drew different pictures: nothing to compare pair by pair")
    differences = [np.array([[int(a) - int(b) for a, b in zip(mine[task], other[task])] for mine, other in zip(ours, theirs)]) for task in tasks]  # (runs, pictures) a task
    runs = len(ours)
    draws = []
    for _ in range(resamples):
        rows = rng.integers(runs, size=runs)
        draws.append(np.mean([d[rows][:, rng.integers(d.shape[1], size=d.shape[1])].mean() for d in differences]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Score(float(np.mean([d.mean() for d in differences])), float(low), float(high), sum(d.size for d in differences))
