"""One visitor's desk: what is being done, what waits, what has been drawn, what went wrong. No page, no torch."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError, reason
from .order import Event, Task

KEPT = 8  # pictures of the history

Run = Callable[[Task], Iterator[Event]]  # `Engine.run`, or that of a shared engine


@dataclass(frozen=True)
class Drawn:
    """A finished picture: its task (to draw it again), facts and PNG."""

    task: Task
    facts: dict[str, Any]
    png: bytes


@dataclass(frozen=True)
class State:
    """A desk at one moment.

    running, waiting: the task being done, and the one after it; None where there is none.
    progress: the newest "waiting" or "preview" event of the running task.
    pictures: the newest finished pictures, the newest first, at most KEPT.
    result: the newest finished comparison, heat-map or walk.
    error: one line about what went wrong last; "" once something new begins.
    note: one line about what the task does otherwise than asked.
    """

    running: Task | None = None
    waiting: Task | None = None
    progress: Event | None = None
    pictures: tuple[Drawn, ...] = ()
    result: Event | None = None
    error: str = ""
    note: str = ""


class Desk:
    """Does one task at a time, in a thread of its own, with a queue of one.

    `state` is what there is to show; `changed` is called after each change, from whichever thread made it.
    """

    def __init__(self, run: Run, changed: Callable[[], None] = lambda: None):
        self._run, self.changed = run, changed
        self._lock, self._stop = threading.Condition(), threading.Event()
        self._thread: threading.Thread | None = None  # one for good: a thread's memory is not given back when it ends
        self.state = State()

    def ask(self, task: Task) -> bool:
        """Begin with `task`, or let it wait. False, with a line in `state.error`, if it cannot be done or one is waiting already."""
        error = ""
        try:
            task = task.checked()
        except UserError as problem:
            error = str(problem)
        with self._lock:
            if not error and self.state.waiting:
                error = "One is being drawn and one is waiting. Please wait, or press Cancel, which drops both."
            if error or self.state.running:
                self.state = replace(self.state, error=error) if error else replace(self.state, error="", waiting=task)
            else:
                self.state = replace(self.state, error="", note="", running=task, progress=None)
                self._lock.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, daemon=True, name="studio")
                    self._thread.start()
        self._tell()
        return not error

    def cancel(self) -> None:
        """Stop what is running, at its next step, and forget what waits."""
        with self._lock:
            self.state = replace(self.state, waiting=None)
            if self.state.running:
                self._stop.set()
        self._tell()

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until nothing is running; False if it still is after `seconds`."""
        with self._lock:
            return self._lock.wait_for(lambda: self.state.running is None, seconds)

    def _tell(self) -> None:
        try:
            self.changed()
        except Exception:  # a page that has gone must not keep the desk from its work
            logging.getLogger(__name__).exception("the page could not be changed")

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self.state.running)
                task = self.state.running
            error = self._do(task)
            with self._lock:
                task = self.state.waiting
                self.state = replace(self.state, error=error or self.state.error, progress=None, running=task, waiting=None, note="" if task else self.state.note)
                self._stop.clear()
                self._lock.notify_all()
            self._tell()

    def _do(self, task: Task) -> str:
        """Take the events of a task until it ends or is stopped; what went wrong, or ""."""
        try:
            with contextlib.closing(self._run(task)) as events:
                for event in events:
                    if self._stop.is_set():
                        return ""
                    self._take(task, event)
            return ""
        except UserError as problem:
            return str(problem)
        except Exception as problem:  # whatever it is, the visitor shall read of it
            logging.getLogger(__name__).exception("a task failed")
            return f"Something went wrong on our side: {type(problem).__name__}, {reason(problem)}."

    def _take(self, task: Task, event: Event) -> None:
        with self._lock:
            if event.kind in ("waiting", "preview"):
                self.state = replace(self.state, progress=event)
            elif event.kind == "picture":
                self.state = replace(self.state, progress=None, pictures=(Drawn(task, event.facts, event.data), *self.state.pictures)[:KEPT])
            elif event.kind == "result":
                self.state = replace(self.state, result=event)
            elif event.kind == "note":
                self.state = replace(self.state, note=event.facts["text"])
            else:
                return
        self._tell()
