"""The generation studio as a page of widgets, for JupyterLab and Voila. What it does lives in `snapgen_core.studio`; here is
only what shows it."""

import base64
import html
import os
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace

import ipywidgets as widgets

from .scales import ENCODERS, PICTURE_DECODERS, SAMPLING, get_scale
from .studio.desk import KEPT, Desk, Drawn, State
from .studio.order import LARGEST_SEED, LONGEST_PROMPT, MOST_PICTURES, MOST_STEPS, UNGUIDED, WHY_UNGUIDED, Order, Task
from .studio.shared import ADDRESS, SharedEngine

EXAMPLES = ("a red apple", "three green stars", "a dog left of a cat", "a purple elephant", "a yellow car and a blue hat", "a photo of a rocket")
ENCODER_NAMES = dict(zip(ENCODERS, ("CLIP-L", "CLIP-G", "language model")))
DECODER_NAMES = {"full": "the autoencoder's own", "tiny": "tiny and fast (Sec. 3.2)"}
STAGE_NAMES = {"base": "base", "kd": "taught (kd)", "distilled": "four steps (distilled)"}
WORLD = "It knows emoji scenes: one to four things such as apples, cars, dogs or stars, eight colours, left, right, above and below."
AFTER_ENTER = 0.1  # seconds

STYLE = """<style>
.snapgen { max-width: 1100px; margin: 0 auto; color: var(--jp-ui-font-color1, #222); }
.snapgen .widget-label, .snapgen .widget-html-content { color: var(--jp-ui-font-color1, #222); }
.snapgen figure { margin: 0; }
.snapgen figcaption { font-size: 12px; line-height: 1.4; color: var(--jp-ui-font-color2, #555); overflow-wrap: anywhere; }
.snapgen img { display: block; width: 100%; border-radius: 4px; background: var(--jp-layout-color2, #eee); }
.snapgen .closer img { width: auto; max-width: 100%; }
.snapgen .row { display: flex; flex-wrap: wrap; gap: 12px; }
.snapgen .row figure { flex: 0 1 320px; min-width: 140px; }
.snapgen .empty { width: min(320px, 100%); aspect-ratio: 1; display: grid; place-content: center; text-align: center; border-radius: 4px; border: 2px dashed var(--jp-border-color1, #bbb); color: var(--jp-ui-font-color2, #555); }
.snapgen .problem { padding: 6px 10px; border-left: 4px solid #c62828; background: var(--jp-layout-color2, #fdecea); }
.snapgen .world { margin-bottom: 6px; color: var(--jp-ui-font-color2, #555); line-height: 1.4; }
.snapgen h2 { margin: 0 0 6px; font-size: 20px; color: var(--jp-ui-font-color1, #222); }
.snapgen h3 { margin: 12px 0 4px; font-size: 15px; color: var(--jp-ui-font-color1, #222); }
.snapgen a { color: var(--jp-content-link-color, #1565c0); }
.snapgen button:focus-visible, .snapgen input:focus-visible, .snapgen select:focus-visible, .snapgen a:focus-visible, .snapgen .noUi-handle:focus-visible { outline: 3px solid #1e88e5; outline-offset: 1px; }
</style>"""


def studio(scale: str = "tiny", engine=None) -> widgets.Widget:
    """The page. Its engine is `engine`, or the shared one of `snapgen demo` if that has started this process, or one of its own.

    Raises:
        UserError: an unknown scale, one without trained weights, or an engine that does not answer.
    """
    get_scale(scale)
    if engine is None and ADDRESS in os.environ:
        engine = SharedEngine()
    elif engine is None:
        from .studio.engine import engine_of  # here, for visitors of a shared engine do without torch

        engine = engine_of(scale)
    return Page(engine).root


class Page:
    """Widgets around a `Desk`. `root` is what to display."""

    def __init__(self, engine):
        self.desk = Desk(engine.run, self.show)
        self._showing = threading.Lock()  # it is told of changes from several threads
        self._enter: threading.Timer | None = None
        wide = {"description_width": "auto"}
        auto = widgets.Layout(width="auto", max_width="100%")
        self.prompt = widgets.Text(EXAMPLES[0], description="Prompt", placeholder="what to draw", continuous_update=False, layout=widgets.Layout(width="auto", flex="1 1 260px", min_width="200px"), style=wide)
        self.prompt.on_msg(lambda _, content, __: self.entered() if content.get("event") == "submit" else None)
        self.generate = _button("Generate", self.draw, "paint-brush", "Draw the prompt", "primary")
        self.stop = _button("Cancel", self.desk.cancel, "stop", "Stop drawing, and drop the task that waits")
        chips = [_button(text, lambda text=text: self.example(text), "", f"Draw {text}") for text in EXAMPLES]

        self.seed = widgets.BoundedIntText(0, 0, LARGEST_SEED, description="Seed", layout=widgets.Layout(width="150px"), style=wide)
        self.dice = _button("Random seed", self.roll, "random", "Another seed")
        self.count = widgets.BoundedIntText(1, 1, MOST_PICTURES, description="Pictures", layout=widgets.Layout(width="130px"), style=wide)
        self.stage = widgets.Dropdown(options=[(STAGE_NAMES[stage], stage) for stage in engine.stages], value=engine.stages[-1], description="Stage", layout=auto, style=wide)
        self.decoder = widgets.Dropdown(options=[(DECODER_NAMES[name], name) for name in PICTURE_DECODERS], value="tiny", description="Decoder", layout=auto, style=wide)
        self.steps = widgets.IntSlider(SAMPLING[engine.stages[-1]][0], 1, MOST_STEPS, description="Steps", layout=widgets.Layout(width="auto", flex="1 1 220px", min_width="200px"), style=wide)
        self.guidance = widgets.FloatSlider(4.0, min=1, max=10, step=0.5, description="Guidance", layout=widgets.Layout(width="auto", flex="1 1 220px", min_width="200px"), style=wide)
        self.why = widgets.HTML()
        self.encoders = {name: widgets.Checkbox(True, description=text, indent=False, layout=widgets.Layout(width="auto")) for name, text in ENCODER_NAMES.items()}

        self.problem, self.status, self.pictures, self.result = (widgets.HTML() for _ in range(4))
        self.word = widgets.Dropdown(description="Word", layout=auto, style=wide)
        self.to_prompt = widgets.Text("", description="End prompt", placeholder="the same", continuous_update=False, layout=widgets.Layout(width="auto", flex="1 1 200px", min_width="180px"), style=wide)
        self.to_seed = widgets.BoundedIntText(1, 0, LARGEST_SEED, description="End seed", layout=widgets.Layout(width="150px"), style=wide)
        self.slots = [_Slot(self.again) for _ in range(KEPT)]
        self.history = widgets.Box([slot.root for slot in self.slots], layout=widgets.Layout(display="flex", flex_flow="row wrap", width="100%", grid_gap="10px"))
        self._shown: Drawn | None = None

        self.stage.observe(lambda _: self.stage_chosen(), "value")
        self.prompt.observe(lambda _: self.words(), "value")
        row = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", width="100%", overflow="visible", grid_gap="4px 10px")
        self.root = widgets.VBox(
            [
                widgets.HTML(f"{STYLE}<h2>SnapGen studio</h2><div class='world'>{WORLD}</div>"),
                widgets.Box([self.prompt, self.generate, self.stop], layout=row),
                widgets.Box(chips, layout=row),
                widgets.Box([self.seed, self.dice, self.count, self.stage, self.decoder], layout=row),
                widgets.Box([self.steps, self.guidance, self.why], layout=row),
                widgets.Box([widgets.HTML("Text encoders"), *self.encoders.values()], layout=row),
                self.problem, self.status, self.pictures,
                widgets.HTML("<h3>Look closer</h3>"),
                widgets.Box([_button("Compare stages", lambda: self.ask("stages"), "columns", "One seed, drawn by every stage"), _button("Compare steps", lambda: self.ask("steps"), "step-forward", "One seed, drawn in 1 to 28 steps")], layout=row),
                widgets.Box([self.word, _button("Show attention to it", lambda: self.ask("word", word=self.word.value or ""), "crosshairs", "Where in the picture this word is read (cross-attention)")], layout=row),
                widgets.Box([self.to_prompt, self.to_seed, _button("Walk", self.walk, "film", "An animation from the prompt and seed above to these")], layout=row),
                self.result,
                widgets.HTML("<h3>History</h3>"),
                self.history,
            ],
            layout=widgets.Layout(width="100%", padding="4px"),
        )
        self.root.add_class("snapgen")
        self.stage_chosen()
        self.words()
        self.show()

    # ------------------------------------------------------------------------------------------- what a visitor does

    @property
    def order(self) -> Order:
        """The page's settings. (A slider may say 3.9999999999999996.)"""
        encoders = tuple(name for name, box in self.encoders.items() if box.value)
        return Order(self.prompt.value, self.seed.value, self.steps.value, round(self.guidance.value, 2), self.stage.value, self.decoder.value, encoders, self.count.value)

    def ask(self, kind: str, **more) -> None:
        self.desk.ask(Task(kind, self.order, **more))

    def draw(self) -> None:
        self.ask("draw")

    def entered(self) -> None:
        """The Enter key: what was typed arrives just after it."""
        if self._enter:
            self._enter.cancel()
        self._enter = threading.Timer(AFTER_ENTER, self.draw)
        self._enter.start()

    def walk(self) -> None:
        self.ask("walk", to_prompt=self.to_prompt.value.strip(), to_seed=self.to_seed.value)

    def example(self, text: str) -> None:
        self.prompt.value = text
        self.draw()

    def roll(self) -> None:
        self.seed.value = random.randint(0, 9999)

    def again(self, drawn: Drawn) -> None:
        """Put the settings of an old picture back, and draw it."""
        order = replace(drawn.task.order, seed=drawn.facts["seed"], count=1)
        self.prompt.value, self.seed.value, self.count.value = order.prompt, order.seed, order.count
        self.stage.value, self.decoder.value, self.steps.value = order.stage, order.decoder, order.steps
        if order.stage not in UNGUIDED:
            self.guidance.value = order.guidance
        for name, box in self.encoders.items():
            box.value = name in order.encoders
        self.draw()

    def stage_chosen(self) -> None:
        self.steps.value = SAMPLING[self.stage.value][0]
        self.guidance.disabled = self.stage.value in UNGUIDED
        self.why.value = html.escape(WHY_UNGUIDED) if self.guidance.disabled else ""

    def words(self) -> None:
        found = list(dict.fromkeys(re.findall(r"\w+", self.prompt.value[:LONGEST_PROMPT])))
        chosen = self.word.value
        self.word.options = found
        if found:
            self.word.value = chosen if chosen in found else found[-1]

    # ------------------------------------------------------------------------------------------- what the page shows

    def show(self) -> None:
        """Bring the page to the desk's state."""
        with self._showing:
            state = self.desk.state
            self.stop.disabled = state.running is None
            self.generate.description = "Generate" if state.running is None else "Queue next"
            self.problem.value = "".join(f'<div class="problem" role="{role}">{html.escape(text)}</div>' for role, text in (("alert", state.error), ("note", state.note)) if text)
            self.status.value = f'<div role="status">{html.escape(told(state))}</div>'
            self.pictures.value = _pictures(state)
            newest = state.pictures[0] if state.pictures else None
            if newest is not None and newest is not self._shown:
                self._shown = newest
                self.slots.insert(0, self.slots.pop())  # the oldest one is written anew
                self.slots[0].fill(newest)
                self.history.children = [slot.root for slot in self.slots]
            if state.result is not None:
                kind = "gif" if state.result.data[:3] == b"GIF" else "png"
                alt, seconds = state.result.facts["alt"], state.result.facts["seconds"]
                caption = f"{html.escape(alt)} {seconds:.1f} s. {_download(state.result.data, kind, 'snapgen', 'this picture')}"
                self.result.value = f'<div class="closer">{_figure(state.result.data, kind, alt, caption)}</div>'


def told(state: State) -> str:
    """The line below the settings."""
    queue = " One more is waiting." if state.waiting else ""
    if state.running is None:
        drawn = state.pictures[0].facts if state.pictures else None
        return f"Ready. The last picture took {drawn['seconds']:.2f} s." if drawn else "Ready."
    if state.progress is None:
        return "Reading the prompt." + queue
    facts = state.progress.facts
    if state.progress.kind == "waiting":
        return f"Please wait: {facts['ahead']} before you." + queue
    if state.running.kind == "walk":
        return f"Walking: frame {facts['step']} of {facts['steps']}." + queue
    several = f"picture {facts['index'] + 1} of {facts['of']}, " if facts["of"] > 1 else ""
    return f"Drawing: {several}step {facts['step']} of {facts['steps']}." + queue


def _pictures(state: State) -> str:
    """The pictures of the running task so far, and the preview; or those of the last task."""
    task = state.running or (state.pictures[0].task if state.pictures else None)
    shown = []
    for drawn in reversed(state.pictures):
        if drawn.task is task:
            prompt, seed = drawn.facts["prompt"], drawn.facts["seed"]
            shown.append(_figure(drawn.png, "png", f"“{prompt}”, seed {seed}", f"seed {seed}, {drawn.facts['seconds']:.2f} s"))
    if state.running and state.progress and state.progress.kind == "preview":
        facts = state.progress.facts
        shown.append(_figure(state.progress.data, "jpeg", f"preview of “{state.running.order.prompt}”, step {facts['step']} of {facts['steps']}", f"step {facts['step']} of {facts['steps']}"))
    return f'<div class="row main">{"".join(shown)}</div>' if shown else '<div class="empty">Type a prompt<br>and press Enter.</div>'


class _Slot:
    """One picture of the history, with its settings, a download, and a button that draws it again."""

    def __init__(self, again: Callable[[Drawn], None]):
        self.picture = widgets.HTML()
        self.drawn: Drawn | None = None
        self.button = _button("Draw again", lambda: again(self.drawn), "repeat", "Take over these settings and draw")
        self.root = widgets.VBox([self.picture, self.button], layout=widgets.Layout(width="150px", display="none"))

    def fill(self, drawn: Drawn) -> None:
        self.drawn, facts = drawn, drawn.facts
        guidance = "" if facts["stage"] in UNGUIDED else f", guidance {facts['guidance']:g}"
        settings = f"{html.escape(facts['prompt'])}; {facts['stage']}, seed {facts['seed']}, {facts['steps']} steps{guidance}, {facts['seconds']:.2f} s. "
        name = (re.sub(r"\W+", "-", facts["prompt"].lower()).strip("-")[:40] or "snapgen") + f"-{facts['seed']}"
        self.picture.value = _figure(drawn.png, "png", f"“{facts['prompt']}”, seed {facts['seed']}", settings + _download(drawn.png, "png", name, f"“{facts['prompt']}”, seed {facts['seed']}"))
        self.button.tooltip = f"Draw “{facts['prompt']}”, seed {facts['seed']}, with these settings again"
        self.root.layout.display = "flex"


def _button(text: str, pressed: Callable[[], None], icon: str, tooltip: str, style: str = "") -> widgets.Button:
    made = widgets.Button(description=text, icon=icon, tooltip=tooltip, button_style=style, layout=widgets.Layout(width="auto"))
    made.on_click(lambda _: pressed())
    return made


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _figure(data: bytes, kind: str, alt: str, caption: str) -> str:
    """`caption` is HTML, `alt` is not."""
    return f'<figure><img alt="{html.escape(alt)}" src="{_uri(data, kind)}"><figcaption>{caption}</figcaption></figure>'


def _download(data: bytes, kind: str, name: str, what: str) -> str:
    return f'<a download="{name}.{kind}" aria-label="Download {html.escape(what)}" href="{_uri(data, kind)}">Download</a>'
