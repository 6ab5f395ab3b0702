"""The studio without a page: orders at the door, events along the way, one thing at a time, several visitors."""

import io
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from snapgen_core import load
from snapgen_core.errors import UserError
from snapgen_core.latents import load_decoder
from snapgen_core.maps import word_maps
from snapgen_core.paths import checkpoint_dir
from snapgen_core.pipeline import to_pil
from snapgen_core.scales import SAMPLING
from snapgen_core.studio import engine as engines
from snapgen_core.studio.desk import KEPT, Desk
from snapgen_core.studio.engine import Engine, on_sphere
from snapgen_core.studio.order import LONGEST_PROMPT, Event, Order, Task
from snapgen_core.studio.shared import SharedEngine, Server

APPLE = Order("a red apple", seed=3, steps=2)


@pytest.fixture(scope="module")
def engine():
    return Engine("tiny")


# ------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prompt": "  "}, "Say what to draw"),
        ({"prompt": None}, "Say what to draw"),
        ({"prompt": "x" * (LONGEST_PROMPT + 1)}, "at most"),
        ({"steps": 0}, "from 1 to 28, not 0"),
        ({"steps": 29}, "from 1 to 28"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"seed": -1}, "seed"),
        ({"count": 5}, "from 1 to 4"),
        ({"guidance": float("nan")}, "Guidance"),
        ({"guidance": "4"}, "Guidance"),
        ({"stage": "turbo"}, "Unknown stage"),
        ({"decoder": "huge"}, "Unknown decoder"),
        ({"encoders": ("clip_x",)}, "Unknown text encoders"),
        ({"encoders": ()}, "at least one text encoder"),
    ],
)
def test_wrong_orders_get_one_line(change, said):
    with pytest.raises(UserError, match=said) as caught:
        replace(APPLE, **change).checked()
    assert "\n" not in str(caught.value)


def test_an_order_is_tidied():
    order = Order(" a dog ", encoders=("lm", "clip_l"), stage="distilled", guidance=7.0).checked()
    assert (order.prompt, order.encoders, order.guidance) == ("a dog", ("clip_l", "lm"), 1.0)  # distilled: without guidance
    facts = {name: str(value) for name, value in order.facts(2).items()}
    assert Order.from_facts(facts) == replace(order, seed=2, count=1)
    for missing in (facts | {"steps": "many"}, {}):
        with pytest.raises(UserError, match="does not say"):
            Order.from_facts(missing)
    assert order.facts(2)["seed"] == 2 and order.facts()["encoders"] == "clip_l, lm"


def test_tasks_travel_as_text():
    task = Task("walk", APPLE, to_prompt="a dog", to_seed=5)
    assert Task.from_json(task.to_json()) == task
    for text in ("", "[]", "{}", '{"kind": "draw", "order": {"prompt": "x"}}', '{"order": {"encoders": [], "evil": 1}}'):
        with pytest.raises(UserError):
            Task.from_json(text)


@pytest.mark.parametrize("task, said", [(Task("walk", APPLE), "somewhere to go"), (Task("walk", APPLE, to_seed=1, frames=99), "frames"), (Task("word", APPLE), "Choose a word"), (Task("sing", APPLE), "Unknown task")])
def test_wrong_tasks_get_one_line(task, said):
    with pytest.raises(UserError, match=said):
        task.checked()


# ------------------------------------------------------------------------------------------------- the engine


def test_a_drawing_is_the_pipelines(engine):
    """Same seed, same picture as `snapgen generate` draws; and the file tells how."""
    events = list(engine.run(Task("draw", replace(APPLE, count=2))))
    assert [event.kind for event in events] == ["preview", "picture", "preview", "picture", "done"]
    assert events[0].facts == {"index": 0, "of": 2, "step": 1, "steps": 2}
    pipe = load("tiny", "base", decoder="tiny")
    for seed, event in zip((3, 4), events[1::2]):
        picture = Image.open(io.BytesIO(event.data))
        expected = pipe("a red apple", 2, 4.0, torch.Generator().manual_seed(seed)).images[0]
        assert picture.tobytes() == expected.tobytes()
        assert (picture.text["prompt"], picture.text["seed"], picture.text["stage"], picture.text["scale"]) == ("a red apple", str(seed), "base", "tiny")
        assert event.facts["seconds"] > 0


def test_stages_and_decoders_are_exchanged(engine):
    def drawn(**change):
        return next(event for event in engine.run(Task("draw", replace(APPLE, **change))) if event.kind == "picture").data

    first = drawn()
    assert len({first, drawn(stage="kd"), drawn(decoder="full"), drawn(encoders=("clip_l",)), drawn(guidance=1.0)}) == 5
    assert drawn() == first  # nothing stays behind


def test_previews_show_the_clean_latent_so_far(engine):
    (preview, *_) = engine.run(Task("draw", APPLE))
    pipe, seen = load("tiny", "base"), []
    pipe("a red apple", 2, 4.0, torch.Generator().manual_seed(3), on_step=lambda step, x0: seen.append(x0), output_type="latent")
    decoder = load_decoder(checkpoint_dir("tiny") / "decoder")
    with torch.no_grad():
        expected = to_pil(decoder(seen[0] / seen[0].std()).sample)[0]
    difference = [abs(a - b) for a, b in zip(Image.open(io.BytesIO(preview.data)).convert("RGB").tobytes(), expected.tobytes())]
    assert sum(difference) / len(difference) < 4  # of 255: JPEG


def test_comparisons(engine, monkeypatch):
    monkeypatch.setattr(engines, "COMPARED_STEPS", (1, 3))
    for kind, columns, previews in (("steps", 2, 2), ("stages", len(engine.stages), sum(SAMPLING[stage][0] - 1 for stage in engine.stages))):
        *before, result, done = engine.run(Task(kind, APPLE))
        assert (result.kind, done.kind, len(before)) == ("result", "done", previews)
        width, height = Image.open(io.BytesIO(result.data)).size
        assert width > columns * 160 and height < 250 and "seed 3" in result.facts["alt"]


def test_a_words_map_is_warm_where_it_is_read(engine):
    *_, result, _ = engine.run(Task("word", APPLE, word="apple"))
    share = word_maps(load("tiny", "base", decoder="tiny"), "a red apple", 3, 2, 4.0)[1]["apple"]
    grid = Image.open(io.BytesIO(result.data)).convert("L")
    right = grid.crop((grid.width // 2, 0, grid.width, engines.SHOWN))
    row, column = divmod(int(share.argmax()), share.shape[1])
    brightest = engines.heat_image(share).convert("L").getpixel((column, row))
    assert brightest == 255 and engines.heat_image(share).convert("L").getextrema()[0] == 0
    assert right.getextrema()[1] > 200
    with pytest.raises(UserError, match="not in the prompt: choose one of a, red, apple"):
        list(engine.run(Task("word", APPLE, word="pear")))
    assert not any(module._forward_hooks for module in engine.at(APPLE).unet.modules())


def test_a_walk_goes_there_and_back(engine):
    *before, result, _ = engine.run(Task("walk", APPLE, to_prompt="a dog", to_seed=9, frames=3))
    assert [event.kind for event in before] == ["preview"] * 3
    animation = Image.open(io.BytesIO(result.data))
    assert (animation.format, animation.n_frames) == ("GIF", 4)
    ends = [next(e for e in engine.run(Task("draw", replace(APPLE, prompt=prompt, seed=seed))) if e.kind == "picture").data for prompt, seed in (("a red apple", 3), ("a dog", 9))]
    for place, end in zip((0, 2), ends):
        animation.seek(place)
        wanted = engines.enlarge(Image.open(io.BytesIO(end)))
        difference = [abs(a - b) for a, b in zip(animation.convert("RGB").tobytes(), wanted.tobytes())]
        assert sum(difference) / len(difference) < 8  # of 255: a GIF has 256 colours


def test_what_is_not_read_is_said(engine):
    long = "a dog " + "and a cat " * 15
    note, *_ = engine.run(Task("draw", replace(APPLE, prompt=long, steps=1)))
    assert note.kind == "note" and "Its end is cut: “" in note.facts["text"] and note.facts["text"].endswith("cat”.")
    with pytest.raises(UserError, match="do not read as far as 'zebra'"):
        list(engine.run(Task("word", replace(APPLE, prompt=f"{long}zebra", steps=1), word="zebra")))


def test_stages_are_compared_each_in_its_own_way(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "_picture", lambda order, index, of: (seen.append((order.stage, order.steps, order.guidance)), (yield), torch.zeros(1, 3, 64, 64))[2])
    *_, result, _ = engine.run(Task("stages", replace(APPLE, stage="kd", steps=3)))
    assert seen == [(stage, *SAMPLING[stage]) for stage in engine.stages] and "base, 28 steps" in result.facts["alt"]


def test_two_drawings_side_by_side_do_not_mix(engine):
    """Two generators, a step of each in turn: as one after the other."""
    tasks = [Task("draw", APPLE), Task("draw", replace(APPLE, stage="kd", decoder="full"))]
    mixed = [event for pair in zip(*map(engine.run, tasks)) for event in pair if event.kind == "picture"]
    alone = [event for task in tasks for event in engine.run(task) if event.kind == "picture"]
    assert [event.data for event in mixed] == [event.data for event in alone]


def test_noise_on_the_way_is_noise():
    a, b = torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_sphere(a, b, 0.0), a) and torch.allclose(on_sphere(a, b, 1.0), b, atol=1e-5)
    assert on_sphere(a, b, 0.5).std() == pytest.approx(1, abs=0.02) and torch.lerp(a, b, 0.5).std() < 0.75
    assert torch.equal(on_sphere(a, a, 0.5), a)


def test_a_scale_without_weights_says_so():
    with pytest.raises(UserError, match="no student at scale paper: train one"):
        Engine("paper")


# ------------------------------------------------------------------------------------------------- a desk


class Slow:
    """An engine's `run` that goes on when told to."""

    def __init__(self):
        self.go, self.seen, self.closed = threading.Semaphore(0), [], 0

    def __call__(self, task):
        self.seen.append(task.order.prompt)
        try:
            for step in range(3):
                yield Event("preview", {"index": 0, "of": 1, "step": step + 1, "steps": 3})
                assert self.go.acquire(timeout=20)
            if task.order.prompt == "fail":
                raise UserError("it does not work")
            if task.order.prompt == "break":
                raise RuntimeError("first line\nsecond")
            yield Event("picture", {"seed": 0, "prompt": task.order.prompt}, task.order.prompt.encode())
        finally:
            self.closed += 1

    def step(self, count=3):
        for _ in range(count):
            self.go.release()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def draw(prompt):
    return Task("draw", Order(prompt))


def test_one_at_a_time_and_a_queue_of_one():
    run = Slow()
    desk = Desk(run)
    assert desk.ask(draw("one"))
    until(lambda: desk.state.progress)
    assert desk.ask(draw("two")) and desk.state.waiting.order.prompt == "two" and run.seen == ["one"]
    assert not desk.ask(draw("three")) and "one is waiting" in desk.state.error
    run.step(6)
    until(lambda: len(desk.state.pictures) == 2 and not desk.state.running)
    assert [drawn.png for drawn in desk.state.pictures] == [b"two", b"one"] and run.seen == ["one", "two"]
    assert not desk.ask(draw("")) and "Say what to draw" in desk.state.error and run.seen == ["one", "two"]


def test_cancelling_stops_at_the_next_step():
    run = Slow()
    desk = Desk(run)
    desk.ask(draw("one"))
    desk.ask(draw("two"))
    until(lambda: desk.state.progress)
    desk.cancel()
    assert desk.state.waiting is None
    run.step(1)
    until(lambda: not desk.state.running)
    assert run.closed == 1 and run.seen == ["one"] and not desk.state.pictures and desk.state.progress is None
    desk.ask(draw("three"))
    run.step(5)
    until(lambda: desk.state.pictures)
    assert desk.state.pictures[0].png == b"three"
    desk.finish(20)
    desk.cancel()  # nothing there: nothing happens
    assert desk.state.running is None


@pytest.mark.parametrize("prompt, said", [("fail", "it does not work"), ("break", "on our side: RuntimeError, first line.")])
def test_errors_are_shown_and_the_next_one_works(prompt, said):
    run, lines = Slow(), []
    desk = Desk(run, lambda: lines.append(desk.state.error))
    desk.ask(draw(prompt))
    run.step()
    until(lambda: not desk.state.running)
    assert said in desk.state.error and desk.state.error == lines[-1]
    desk.ask(draw("good"))
    run.step()
    until(lambda: desk.state.pictures)
    assert desk.state.error == ""


def test_a_page_that_fails_does_not_stop_the_desk():
    run = Slow()
    desk = Desk(run, lambda: 1 / 0)
    desk.ask(draw("one"))
    desk.ask(draw("two"))
    run.step(6)
    until(lambda: len(desk.state.pictures) == 2 and not desk.state.running)


def test_a_refusal_stays_to_be_read():
    run = Slow()
    desk = Desk(run)
    desk.ask(draw("one"))
    desk.ask(draw(""))
    run.step()
    until(lambda: not desk.state.running)
    assert "Say what to draw" in desk.state.error


def test_the_history_ends_somewhere():
    desk = Desk(lambda task: iter_events(task))
    for number in range(KEPT + 3):
        desk.ask(draw(f"number {number}"))
        assert desk.finish(20)
        until(lambda: not desk.state.running)
    assert len(desk.state.pictures) == KEPT and desk.state.pictures[0].png == f"number {KEPT + 2}".encode()


def iter_events(task):
    yield Event("picture", {"seed": 0}, task.order.prompt.encode())


def test_fifty_drawings_and_twenty_cancels(engine):
    """At random moments; the last picture is right for its seed, and nothing is left behind."""
    before = 1 + sum(thread.name == "studio" for thread in threading.enumerate())
    desk, random = Desk(engine.run), torch.Generator().manual_seed(0)
    for number in range(50):
        assert desk.ask(Task("draw", replace(APPLE, seed=number)))
        if number % 5 in (1, 3):
            time.sleep(torch.rand(1, generator=random).item() / 10)
            desk.cancel()
        assert desk.finish(60)
        until(lambda: not desk.state.running)
        assert desk.state.error == ""
    wanted = next(event for event in engine.run(Task("draw", replace(APPLE, seed=49))) if event.kind == "picture")
    assert desk.state.pictures[0].png == wanted.data
    assert sum(thread.name == "studio" for thread in threading.enumerate()) == before


# ------------------------------------------------------------------------------------------------- a shared engine


@pytest.fixture
def shared(monkeypatch):
    """A server around a slow engine, and a way in."""
    run = Slow()
    server = Server(run, ["base"])
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield SimpleNamespace(run=run, server=server)
    server.close()


def test_visitors_take_turns_and_get_their_own(shared):
    desks = [Desk(SharedEngine().run) for _ in range(3)]
    for number, desk in enumerate(desks):
        desk.ask(draw(f"number {number}"))
        until(lambda: desk.state.progress)
    until(lambda: [desk.state.progress.kind for desk in desks] == ["preview", "waiting", "waiting"])
    assert [desk.state.progress.facts["ahead"] for desk in desks[1:]] == [1, 2]
    shared.run.step(9)
    until(lambda: all(desk.state.pictures for desk in desks))
    assert [desk.state.pictures[0].png for desk in desks] == [b"number 0", b"number 1", b"number 2"]


def test_who_waits_may_leave(shared):
    first, second, third = (Desk(SharedEngine().run) for _ in range(3))
    for desk, prompt in ((first, "one"), (second, "two"), (third, "three")):
        desk.ask(draw(prompt))
        until(lambda: desk.state.progress)
    second.cancel()
    until(lambda: not second.state.running)
    until(lambda: third.state.progress.facts["ahead"] == 1)
    first.cancel()
    end = time.monotonic() + 20
    while first.state.running:  # the word to stop travels while steps are under way
        assert time.monotonic() < end
        shared.run.step(1)
        time.sleep(0.1)
    shared.run.step(3)
    until(lambda: third.state.pictures)
    assert shared.run.seen == ["one", "three"] and second.state.error == first.state.error == ""
    second.ask(draw("four"))  # the same connection goes on
    shared.run.step(3)
    until(lambda: second.state.pictures)


def test_errors_cross_the_border(shared):
    desk = Desk(SharedEngine().run)
    desk.ask(draw("fail"))
    shared.run.step()
    until(lambda: not desk.state.running)
    assert desk.state.error == "it does not work"
    desk.ask(draw("break"))
    shared.run.step()
    until(lambda: not desk.state.running)
    assert desk.state.error == "The engine failed: RuntimeError, first line."


def test_a_task_that_comes_right_after_the_last_word_is_not_lost():
    """The server must not look for CANCEL once a task is done: what is there is the next task."""

    class Wire:
        sent, closed = [], False

        def send_bytes(self, data):
            self.sent.append(data)

        def poll(self):
            raise AssertionError("looked at what belongs to the next task")

    server = Server(lambda task: iter([Event("done", {})]), ["base"])
    server._in_turn = lambda message: (event for event in [Event("done", {})])
    server._answer(Wire(), draw("one").to_json().encode())
    assert len(Wire.sent) == 2
    server.close()


def test_nonsense_at_the_door_keeps_nobody_out(shared):
    port = int(shared.server.environment["SNAPGEN_STUDIO_ADDRESS"])
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff" * 64):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
    silent = socket.create_connection(("127.0.0.1", port))  # says nothing, and is not waited for
    assert SharedEngine().stages == ["base"]
    silent.close()
    shared.server.close()
    until(lambda: not any(thread.name == "studio-server" for thread in threading.enumerate()))


def test_ten_at_once_are_told_to_wait(shared):
    desks = [Desk(SharedEngine().run) for _ in range(10)]
    for number, desk in enumerate(desks):
        desk.ask(draw(f"number {number}"))
        until(lambda: desk.state.progress)
    assert [desk.state.progress.facts["ahead"] for desk in desks[1:]] == list(range(1, 10))
    shared.run.step(30)
    until(lambda: all(desk.state.pictures for desk in desks))
    assert [desk.state.pictures[0].png.decode() for desk in desks] == [f"number {number}" for number in range(10)]


def test_strangers_stay_outside(shared, monkeypatch):
    monkeypatch.setenv("SNAPGEN_STUDIO_KEY", "guessed")
    with pytest.raises(UserError, match="does not answer"):
        SharedEngine()
    monkeypatch.delenv("SNAPGEN_STUDIO_ADDRESS")
    with pytest.raises(UserError, match="snapgen demo"):
        SharedEngine()


def test_an_engine_that_has_gone(shared):
    visitor = SharedEngine()
    desk = Desk(visitor.run)
    visitor._connection.close()
    desk.ask(draw("one"))
    until(lambda: not desk.state.running)
    assert "reload the page" in desk.state.error
