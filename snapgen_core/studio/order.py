"""What a visitor can ask for, checked at the door; and what comes back. Plain data, so that it can travel between processes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..errors import UserError
from ..scales import ENCODERS, PICTURE_DECODERS, PICTURE_STAGES, SAMPLING

LONGEST_PROMPT = 200  # characters; the text encoders of `tiny` read some 24 tokens
MOST_STEPS, MOST_PICTURES, MOST_FRAMES = 28, 4, 24
LARGEST_SEED = 2**31 - 1
COMPARED_STEPS = (1, 2, 4, 8, 28)
FRAMES = 12  # of a walk
UNGUIDED = tuple(stage for stage in PICTURE_STAGES if SAMPLING[stage][1] == 1)  # distilled to draw without guidance
WHY_UNGUIDED = "Guidance is part of what this stage has learned; it needs one network call a step, not two."


@dataclass(frozen=True)
class Order:
    """Everything that decides on pictures: the same order draws the same pictures.

    Picture number i has the seed `seed + i`.
    """

    prompt: str
    seed: int = 0
    steps: int = 28
    guidance: float = 4.0
    stage: str = "base"
    decoder: str = "tiny"
    encoders: tuple[str, ...] = ENCODERS
    count: int = 1

    def checked(self) -> Self:
        """The order as it is carried out. Raises UserError, a line for whoever asked."""
        prompt = self.prompt.strip() if isinstance(self.prompt, str) else ""
        if not prompt:
            raise UserError('Say what to draw, for example "a red apple".')
        if len(prompt) > LONGEST_PROMPT:
            raise UserError(f"The prompt has {len(prompt)} characters; at most {LONGEST_PROMPT} are allowed.")
        for name, value, low, high in (("seed", self.seed, 0, LARGEST_SEED), ("steps", self.steps, 1, MOST_STEPS), ("number of pictures", self.count, 1, MOST_PICTURES)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"The {name} must be a whole number from {low} to {high}, not {value!r}.")
        if not isinstance(self.guidance, int | float) or not 1 <= self.guidance <= 30:  # false for nan too
            raise UserError(f"Guidance must be a number from 1 to 30, not {self.guidance!r}.")
        for name, value, known in (("stage", self.stage, PICTURE_STAGES), ("decoder", self.decoder, PICTURE_DECODERS)):
            if value not in known:
                raise UserError(f"Unknown {name} {value!r}: choose one of {', '.join(known)}.")
        encoders = tuple(name for name in ENCODERS if name in self.encoders)
        if len(encoders) != len(self.encoders):
            raise UserError(f"Unknown text encoders among {', '.join(map(str, self.encoders))}: choose from {', '.join(ENCODERS)}.")
        if not encoders:
            raise UserError("Choose at least one text encoder: without any, the prompt is not read.")
        return replace(self, prompt=prompt, encoders=encoders, guidance=1.0 if self.stage in UNGUIDED else float(self.guidance))

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> Self:
        """The order of a picture, from the text in its file (`facts`). Raises UserError where that is no picture of ours."""
        try:
            numbers = {name: kind(facts[name]) for name, kind in (("seed", int), ("steps", int), ("guidance", float), ("count", int))}
            return cls(facts["prompt"], **numbers, stage=facts["stage"], decoder=facts["decoder"], encoders=tuple(facts["encoders"].split(", "))).checked()
        except (KeyError, ValueError):
            raise UserError("This picture does not say how it was drawn.") from None

    def facts(self, index: int = 0) -> dict[str, Any]:
        """What a picture's file tells of how it was drawn."""
        return {**asdict(self), "encoders": ", ".join(self.encoders), "seed": self.seed + index, "count": 1, "software": "snapgen"}


@dataclass(frozen=True)
class Task:
    """An order, and what is to be made of it: "draw" its pictures; compare "stages" or "steps" on its seed; show where in the
    picture the student reads a "word"; "walk" to another prompt or seed."""

    kind: str
    order: Order
    word: str = ""  # of the prompt
    to_prompt: str = ""  # the walk's end; empty: the same
    to_seed: int | None = None  # None: the same
    frames: int = FRAMES

    def checked(self) -> Self:
        """Raises UserError."""
        order = self.order.checked()
        if self.kind not in ("draw", "stages", "steps", "word", "walk"):
            raise UserError(f"Unknown task {self.kind!r}.")
        if self.kind == "word" and not self.word:
            raise UserError("Choose a word of the prompt.")
        if self.kind != "walk":
            return replace(self, order=order)
        end = replace(order, prompt=self.to_prompt or order.prompt, seed=order.seed if self.to_seed is None else self.to_seed).checked()
        if (end.prompt, end.seed) == (order.prompt, order.seed):
            raise UserError("A walk needs somewhere to go: another prompt, or another seed.")
        if not isinstance(self.frames, int) or not 2 <= self.frames <= MOST_FRAMES:
            raise UserError(f"A walk has 2 to {MOST_FRAMES} frames, not {self.frames!r}.")
        return replace(self, order=order, to_prompt=end.prompt, to_seed=end.seed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UserError for anything else than a task."""
        try:
            fields = json.loads(text)
            order = fields.pop("order")
            return cls(order=Order(**order | {"encoders": tuple(order["encoders"])}), **fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("Not a valid task.") from None


@dataclass(frozen=True)
class Event:
    """Something that happened while a task was done.

    kind: "waiting" (facts: ahead, how many are), "note" (facts: text, a line for the visitor), "preview" (a picture so far; facts: index, step, steps, of), "picture" (facts:
    index, seconds, and the order's own), "result" (of the other tasks; facts: alt, seconds), "failed" (facts: error), "done".
    data: the bytes of a PNG, of a JPEG ("preview") or of a GIF (a walk).
    """

    kind: str
    facts: dict[str, Any]
    data: bytes = b""
