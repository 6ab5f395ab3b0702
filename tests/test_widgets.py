"""The studio's page without a browser: what its widgets hold, and what its buttons do."""

import base64
import io
import re
import time

import ipywidgets
import psutil
import pytest
import torch
from PIL import Image

from snapgen_core import widgets
from snapgen_core.errors import UserError
from snapgen_core.studio.engine import Engine
from snapgen_core.studio.desk import KEPT
from snapgen_core.studio.order import Event, Order, Task
from snapgen_core.studio.shared import Server


class Stub:
    """An engine that draws at once: a preview, and a picture of one colour."""

    stages = ["base", "kd", "distilled"]

    def __init__(self):
        self.tasks = []

    def run(self, task):
        self.tasks.append(task)
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (task.order.seed % 256, 0, 0)).save(picture, "PNG")
        yield Event("preview", {"index": 0, "of": 1, "step": 1, "steps": task.order.steps}, b"\xff\xd8")
        if task.kind == "draw":
            for index in range(task.order.count):
                yield Event("picture", task.order.facts(index) | {"index": index, "of": task.order.count, "seconds": 0.5}, picture.getvalue())
        else:
            yield Event("result", {"alt": f"what {task.kind} found <b>", "seconds": 1.0}, picture.getvalue())
        yield Event("done", {})


@pytest.fixture
def page():
    return widgets.Page(Stub())


def settled(page, seconds=30):
    end = time.monotonic() + seconds
    while page.desk.state.running:
        assert time.monotonic() < end
        page.desk.finish(0.1)


def press(page, text):
    (button,) = [widget for widget in walk(page.root) if isinstance(widget, ipywidgets.Button) and widget.description == text]
    button.click()
    settled(page)


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def test_a_click_draws_what_the_page_says(page):
    page.stage.value, page.prompt.value, page.seed.value, page.steps.value, page.count.value = "kd", "a <dog>", 7, 9, 2
    page.encoders["lm"].value = False
    press(page, "Generate")
    task = page.desk.state.pictures[0].task
    assert task.order == Order("a <dog>", 7, 9, 4.0, "kd", "tiny", ("clip_l", "clip_g"), 2)
    assert page.pictures.value.count("<img") == 2 and "seed 8" in page.pictures.value
    assert "<dog>" not in page.pictures.value + page.slots[0].picture.value  # escaped: a prompt is no HTML
    assert "a &lt;dog&gt;; kd, seed 8, 9 steps, guidance 4, 0.50 s" in page.slots[0].picture.value
    assert 'download="a-dog-8.png"' in page.slots[0].picture.value and "Ready. The last picture took 0.50 s." in page.status.value


def test_enter_draws(page):
    page.prompt._handle_custom_msg({"event": "submit"}, [])
    page.prompt.value = "what was typed last"  # comes after the key
    end = time.monotonic() + 20
    while not page.desk.state.pictures:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert page.desk.state.pictures[0].facts["prompt"] == "what was typed last"


def test_examples_and_the_dice(page):
    press(page, "a purple elephant")
    assert page.prompt.value == "a purple elephant" and page.desk.state.pictures[0].facts["prompt"] == "a purple elephant"
    seeds = set()
    for _ in range(5):
        press(page, "Random seed")
        seeds.add(page.seed.value)
    assert len(seeds) > 1


def test_guidance_is_off_where_it_is_learned(page):
    assert page.stage.value == "distilled" and page.guidance.disabled and "one network call" in page.why.value and page.steps.value == 4
    page.stage.value = "base"
    assert not page.guidance.disabled and page.why.value == "" and page.steps.value == 28


def test_again_with_these(page):
    page.stage.value, page.prompt.value, page.seed.value, page.steps.value, page.count.value = "base", "a dog", 5, 11, 2
    page.guidance.value = 2.5
    page.encoders["clip_g"].value = False
    press(page, "Generate")
    page.stage.value, page.prompt.value, page.seed.value, page.steps.value, page.guidance.value = "kd", "a cat", 1, 4, 7
    page.encoders["clip_g"].value = True
    page.slots[0].button.click()
    settled(page)
    assert page.order == Order("a dog", 6, 11, 2.5, "base", "tiny", ("clip_l", "lm"), 1) == page.desk.state.pictures[0].task.order


def test_the_history_keeps_its_order(page):
    for seed in range(KEPT + 2):
        page.seed.value = seed
        press(page, "Generate")
    shown = [slot for root in page.history.children for slot in page.slots if slot.root is root]
    assert [slot.drawn.facts["seed"] for slot in shown] == list(range(KEPT + 1, 1, -1))
    assert len(list(walk(page.root))) == len(list(walk(widgets.Page(Stub()).root)))  # no widget is made along the way


def test_looking_closer(page):
    page.prompt.value = "a dog, a cat"
    assert page.word.options == ("a", "dog", "cat") and page.word.value == "cat"
    press(page, "Compare steps")
    press(page, "Compare stages")
    press(page, "Show attention to it")
    assert "what word found &lt;b&gt;" in page.result.value
    page.to_prompt.value, page.to_seed.value = " a tree ", 3
    press(page, "Walk")
    kinds = [(task.kind, task.word, task.to_prompt, task.to_seed) for task in page.desk._run.__self__.tasks]
    assert kinds == [("steps", "", "", None), ("stages", "", "", None), ("word", "cat", "", None), ("walk", "", "a tree", 3)]


def test_errors_are_on_the_page(page):
    page.prompt.value = " "
    press(page, "Generate")
    assert 'role="alert"' in page.problem.value and "Say what to draw" in page.problem.value
    page.prompt.value = "a dog"
    press(page, "Generate")
    assert page.problem.value == ""


def test_everything_can_be_named(page):
    """A label or a text for each control, for those who do not see it."""
    controls = [widget for widget in walk(page.root) if not isinstance(widget, ipywidgets.Box | ipywidgets.HTML)]
    assert len(controls) > 25 and all(widget.description for widget in controls)
    assert all(re.search(r'alt="[^"]{5,}"', html) for html in re.findall(r"<img[^>]*>", page.pictures.value))


def test_wrong_scales_and_lost_engines(monkeypatch):
    with pytest.raises(UserError, match="unknown scale"):
        widgets.studio("huge")
    monkeypatch.setenv("SNAPGEN_STUDIO_ADDRESS", "1")
    with pytest.raises(UserError, match="does not answer"):
        widgets.studio("tiny")


def test_a_shared_engine_is_found(monkeypatch):
    stub = Stub()
    server = Server(stub.run, ["base"])
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    root = widgets.studio("tiny")
    (generate,) = [widget for widget in walk(root) if getattr(widget, "description", "") == "Generate"]
    generate.click()
    end = time.monotonic() + 20
    while not stub.tasks:
        assert time.monotonic() < end
        time.sleep(0.01)
    server.close()


def test_fifty_drawings_and_twenty_cancels():
    """At random moments: no error, the last picture right for its seed, and memory where it was."""
    engine = Engine("tiny")
    page, random = widgets.Page(engine), torch.Generator().manual_seed(0)
    page.stage.value, page.steps.value = "base", 3

    def click(seed):
        page.seed.value = seed
        page.draw()

    for seed in range(KEPT + 2):
        click(seed)
        settled(page)
    before = psutil.Process().memory_info().rss
    for seed in range(50):
        click(seed)
        if seed % 5 in (1, 3):
            time.sleep(torch.rand(1, generator=random).item() / 5)
            page.desk.cancel()
        settled(page)
        assert page.problem.value == ""
    assert psutil.Process().memory_info().rss < 1.05 * before
    wanted = next(event for event in engine.run(Task("draw", page.order)) if event.kind == "picture")
    assert base64.b64encode(wanted.data).decode() in page.pictures.value and page.seed.value == 49
