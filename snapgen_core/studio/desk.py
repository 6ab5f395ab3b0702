"""One visitor's desk: what is being done, what waits, what has been drawn, what went wrong. No page, no torch."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, reason
from .order import Event, Task

KEPT = 24  # pictures of the history

Run = Callable[[Task], Iterator[Event]]  # `Engine.run`, or that of a shared engine


@dataclass(frozen=True)
class Drawn:
    """A finished picture: its task (to draw it again), facts and PNG."""

    task: Task
    facts: dict[str, Any]
    png: bytes


class Desk:
    """Does one task at a time, in a thread of its own, with a queue of one.

    Whoever shows the desk reads the attributes after each call of `changed`, which comes from that thread:

    running, waiting: the task being done, and the one after it; None where there is none.
    progress: the newest "waiting" or "preview" event of the running task.
    pictures: the newest finished pictures, the newest first, at most KEPT.
    result: the newest finished comparison, heat-map or walk.
    error: one line about what went wrong last; "" once something new begins.
    """

    def __init__(self, run: Run, changed: Callable[[], None] = lambda: None):
        self._run, self.changed = run, changed
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.running: Task | None = None
        self.waiting: Task | None = None
        self.progress: Event | None = None
        self.pictures: deque[Drawn] = deque(maxlen=KEPT)
        self.result: Event | None = None
        self.error = ""

    def ask(self, task: Task) -> bool:
        """Begin with `task`, or let it wait. False, with a line in `error`, if it cannot be done or one is waiting already."""
        try:
            task = task.checked()
        except UserError as error:
            self.error = str(error)
            self.changed()
            return False
        with self._lock:
            if self.waiting:
                self.error = "One is being drawn and one is waiting: wait, or cancel."
                taken = False
            else:
                self.error, taken = "", True
                if self.running:
                    self.waiting = task
                else:
                    self._begin(task)
        self.changed()
        return taken

    def cancel(self) -> None:
        """Stop what is running, at its next step, and forget what waits."""
        with self._lock:
            self.waiting = None
            self._stop.set()
        self.changed()

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until nothing is running; False if it still is after `seconds`."""
        thread = self._thread
        if thread:
            thread.join(seconds)
        return self.running is None

    def _begin(self, task: Task) -> None:
        self.running, self.progress = task, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(task, self._stop), daemon=True, name="studio")
        self._thread.start()

    def _work(self, task: Task | None, stop: threading.Event) -> None:
        while task:
            error = ""
            events = self._run(task)
            try:
                for event in events:
                    if stop.is_set():
                        break
                    self._take(task, event)
            except UserError as problem:
                error = str(problem)
            except Exception as problem:  # whatever it is, the visitor shall read of it
                logging.getLogger(__name__).exception("a task failed")
                error = f"That went wrong, and it is our fault: {type(problem).__name__}, {reason(problem)}."
            finally:
                events.close()
            with self._lock:
                self.error, self.progress = error, None
                task, self.waiting = self.waiting, None
                self.running = task
                self._stop = stop = threading.Event()
            self.changed()

    def _take(self, task: Task, event: Event) -> None:
        if event.kind in ("waiting", "preview"):
            self.progress = event
        elif event.kind == "picture":
            self.pictures.appendleft(Drawn(task, event.facts, event.data))
            self.progress = None
        elif event.kind == "result":
            self.result = event
        else:
            return
        self.changed()
