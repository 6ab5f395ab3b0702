"""One engine for several visitors, each in a process of its own: the models are loaded once, and everybody takes turns.

The engine's process listens on this machine only, and only to those who know its key. What travels is JSON and the bytes of
pictures, nothing that could run.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Self

from ..errors import UserError, reason
from .desk import Run
from .order import Event, Task

ADDRESS, KEY = "SNAPGEN_STUDIO_ADDRESS", "SNAPGEN_STUDIO_KEY"  # environment variables by which visitors find the engine
PATIENCE = 0.2  # seconds between two words to those who wait
CANCEL = b"cancel"
ENDS = ("done", "failed")  # kinds of events after which a task has none


def send(connection: Connection, event: Event) -> None:
    connection.send_bytes(json.dumps({"kind": event.kind, "facts": event.facts}).encode())
    connection.send_bytes(event.data)


def receive(connection: Connection) -> Event:
    header = json.loads(connection.recv_bytes())
    return Event(header["kind"], header["facts"], connection.recv_bytes())


class Server:
    """Serves `run`, an engine's, to whoever connects; first come, first served.

    environment: what a visitor's process needs to find it.
    """

    def __init__(self, run: Run, stages: list[str]):
        self._run, self._stages = run, stages
        self._queue: deque[object] = deque()
        self._moved = threading.Condition()
        self._key = secrets.token_hex(16)
        self._listener = Listener(("127.0.0.1", 0))
        self._address, self._closed = self._listener.address, False
        self.environment = {ADDRESS: str(self._address[1]), KEY: self._key}
        threading.Thread(target=self._accept, daemon=True, name="studio-server").start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No new visitors. Those who are there are served until they leave."""
        self._closed = True
        with contextlib.suppress(OSError):  # a last visitor, so that the door is looked at once more
            socket.create_connection(self._address, timeout=1).close()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                with contextlib.suppress(OSError, EOFError):  # gone before it had begun
                    connection = self._listener.accept()
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """One visitor who knows the key, task after task, until the connection ends."""
        try:
            with connection:
                deliver_challenge(connection, self._key.encode())
                answer_challenge(connection, self._key.encode())
                send(connection, Event("hello", {"stages": self._stages}))
                while True:
                    message = connection.recv_bytes()
                    if message != CANCEL:  # one that came too late for its task
                        self._answer(connection, message)
        except (EOFError, OSError, AuthenticationError):
            pass  # the visitor left, or was none

    def _answer(self, connection: Connection, message: bytes) -> None:
        events = self._in_turn(message)
        try:
            for event in events:
                send(connection, event)
                if event.kind in ENDS:  # what comes now belongs to the next task
                    break
                if connection.poll() and connection.recv_bytes() == CANCEL:
                    send(connection, Event("done", {}))
                    break
        finally:
            events.close()

    def _in_turn(self, message: bytes) -> Iterator[Event]:
        """The events of a task, after "waiting" as long as others are ahead."""
        ticket = object()
        with self._moved:
            self._queue.append(ticket)
        try:
            while ahead := self._queue.index(ticket):
                yield Event("waiting", {"ahead": ahead})
                with self._moved:
                    self._moved.wait(PATIENCE)
            yield from self._run(Task.from_json(message.decode()))
        except UserError as error:
            yield Event("failed", {"error": str(error)})
        except Exception as error:
            logging.getLogger(__name__).exception("a task failed")
            yield Event("failed", {"error": f"The engine failed: {type(error).__name__}, {reason(error)}."})
        finally:
            with self._moved:
                self._queue.remove(ticket)
                self._moved.notify_all()


class SharedEngine:
    """An engine in another process, with an engine's `stages` and `run`.

    Raises:
        UserError: the environment names none, or it does not answer.
    """

    def __init__(self):
        if ADDRESS not in os.environ:
            raise UserError("no shared engine: start it with `snapgen demo`")
        try:
            self._connection = Client(("127.0.0.1", int(os.environ[ADDRESS])), authkey=os.environ.get(KEY, "").encode())
            self.stages: list[str] = receive(self._connection).facts["stages"]
        except (OSError, EOFError, ValueError, AuthenticationError) as error:
            raise UserError(f"the studio's engine does not answer: {reason(error)}") from None

    def run(self, task: Task) -> Iterator[Event]:
        """As `Engine.run`."""
        ended = False
        try:
            self._connection.send_bytes(task.to_json().encode())
            while not ended:
                event = receive(self._connection)
                ended = event.kind in ENDS
                if event.kind == "failed":
                    raise UserError(event.facts["error"])
                yield event
        except (EOFError, OSError):
            ended = True
            raise UserError("The studio's engine has gone: reload the page.") from None
        finally:
            if not ended:  # whoever listened has cancelled
                with contextlib.suppress(EOFError, OSError):
                    self._connection.send_bytes(CANCEL)
                    while receive(self._connection).kind not in ENDS:
                        pass
