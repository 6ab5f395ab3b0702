"""The studio in a real browser, in JupyterLab and served by Voila.

Needs Chromium: the system's, or Playwright's own (`playwright install chromium`). Screenshots lie in exports/browser for a
person to look at. Times are printed, never judged: `pytest -s tests/test_browser.py`.
"""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from snapgen_core.studio.engine import Engine
from snapgen_core.studio.order import Order, Task

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "exports" / "browser"
VISITORS = 3

# Resolves to milliseconds from a click on Generate to the first preview and to the finished picture.
CLICK = """() => new Promise((done, fail) => {
    setTimeout(() => fail('no new picture after a minute'), 60000);
    const began = performance.now(), old = document.querySelector('.snapgen .main img')?.src;
    let preview = null;
    new MutationObserver((_, observer) => {
        for (const image of document.querySelectorAll('.snapgen .main img')) {
            if (image.src.startsWith('data:image/jpeg')) preview ??= performance.now() - began;
            if (image.src.startsWith('data:image/png') && image.src !== old) { observer.disconnect(); done([preview, performance.now() - began]); }
        }
    }).observe(document.body, {subtree: true, childList: true, attributes: true});
    document.querySelector('.snapgen button.mod-primary').click();
})"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else [])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium here (playwright install chromium): {str(error).splitlines()[0]}")
        SHOTS.mkdir(parents=True, exist_ok=True)
        yield started
        started.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served(command: list[str], url: str, seconds: float = 120):
    """Starts a server in a process group of its own, and ends it and its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, cwd=ROOT)
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, process.stderr.read().decode()[-2000:]
                assert time.monotonic() < end, f"{url} does not answer"
                time.sleep(0.3)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def demo(browser):
    port = free_port()
    # A page of Voila's is a kernel: ask for its static files instead, to see whether it is there.
    generator = served([sys.executable, "-m", "snapgen_core.cli", "demo", "--port", str(port), "--visitors", str(VISITORS)], f"http://localhost:{port}/voila/static/voila.js")
    process = next(generator)
    yield SimpleNamespace(url=f"http://localhost:{port}/", kernels=lambda: kernels_of(process))
    generator.close()


@pytest.fixture
def visit(browser, demo):
    """Opens the studio for one more visitor."""
    contexts = []

    def come(width: int = 1200, height: int = 1000, ready: bool = True, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.goto(demo.url, timeout=60_000)
        if ready:
            page.get_by_role("button", name="Generate").wait_for(timeout=60_000)
        return page

    yield come
    for context in contexts:
        for page in context.pages:
            leave(page)
        context.close()
    wait_for_kernels(demo, 0)


def leave(page) -> None:
    """Close a page as a person does: it says goodbye."""
    page.goto("about:blank")
    page.close()


def wait_for_kernels(demo, most: int, seconds: float = 60) -> None:
    """Until no more than so many kernels are there: a visitor's ends when his page is closed."""
    end = time.monotonic() + seconds
    while demo.kernels() > most:
        assert time.monotonic() < end, "kernels are left behind"
        time.sleep(0.3)


def kernels_of(server: subprocess.Popen) -> int:
    count = 0
    for child in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            count += "ipykernel_launcher" in " ".join(child.cmdline())
    return count


@pytest.fixture(scope="module")
def engine():
    return Engine("tiny")


def set_steps(page, steps: int) -> None:
    """By keyboard, from 28 down: Home goes to 1, each arrow one up."""
    handle = page.locator(".snapgen .noUi-handle").first
    handle.focus()
    page.keyboard.press("Home")
    for _ in range(steps - 1):
        page.keyboard.press("ArrowRight", delay=100)
    page.locator(".snapgen .widget-readout", has_text=re.compile(f"^{steps}$")).wait_for()
    page.wait_for_timeout(300)


def shown(page) -> list[bytes]:
    """The finished pictures on the page."""
    sources = page.locator(".snapgen .main img").evaluate_all("images => images.map(image => image.src)")
    return [base64.b64decode(source.split(",", 1)[1]) for source in sources if source.startswith("data:image/png")]


def ready(page, seconds: float = 60) -> None:
    page.get_by_text(re.compile("^Ready. The last picture")).wait_for(timeout=1000 * seconds)


def test_type_a_prompt_and_generate(visit, engine):
    page = visit()
    page.get_by_label("Prompt", exact=True).fill("a green star")
    page.get_by_label("Seed", exact=True).fill("11")
    page.keyboard.press("Tab")
    page.evaluate(CLICK)
    ready(page)
    (first,) = shown(page)
    picture = Image.open(io.BytesIO(first))
    assert (picture.text["prompt"], picture.text["seed"]) == ("a green star", "11")
    assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 30, "the picture is blank"
    page.screenshot(path=SHOTS / "voila.png")

    page.get_by_label("Stage", exact=True).select_option("base")
    page.locator(".snapgen .widget-readout", has_text=re.compile("^28$")).wait_for()  # the stage's own number of steps
    set_steps(page, 4)
    times = []
    for seed in range(3):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.keyboard.press("Tab")  # a number counts when its field is left
        times.append(page.evaluate(CLICK))
    print("\nclick to first preview and to the finished picture in 4 steps, ms: " + "; ".join(f"{preview:.0f}, {finished:.0f}" for preview, finished in times))
    wanted = next(event for event in engine.run(Task("draw", Order("a green star", 2, 4, 4.0, "base"))) if event.kind == "picture")
    assert shown(page) == [wanted.data] != [first]


def test_cancel_and_errors(visit):
    page = visit()
    page.get_by_label("Stage", exact=True).select_option("base")  # 28 steps: time enough to cancel
    page.get_by_label("Pictures", exact=True).fill("4")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Generate").click()
    page.locator(".snapgen .main img").first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text(re.compile("^Ready")).wait_for()
    assert len(shown(page)) < 4
    page.get_by_label("Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate").click()
    assert "Say what to draw" in page.get_by_role("alert").inner_text()
    page.get_by_label("Prompt", exact=True).fill("x" * 300)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("at most 200 are allowed").wait_for()
    page.get_by_label("Prompt", exact=True).fill("a red apple")
    page.get_by_label("Pictures", exact=True).fill("1")
    page.get_by_label("Seed", exact=True).fill("5")
    page.keyboard.press("Tab")
    page.evaluate(CLICK)
    ready(page)
    assert page.get_by_role("alert").count() == 0


def test_by_keyboard_alone(visit):
    """Tab reaches everything, Enter draws, and the focus can be seen."""
    page = visit()
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("a yellow star")
    page.keyboard.press("Enter")
    ready(page)
    assert Image.open(io.BytesIO(shown(page)[0])).text["prompt"] == "a yellow star"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.tagName === 'SELECT' ? 'select' : e.innerText || e.type || e.role)(document.activeElement)"))
    assert {"Generate", "Random seed", "Compare steps", "Show attention to it", "Walk", "checkbox", "select"} <= {text.strip() for text in reached if text}


def test_looking_closer(visit):
    page = visit()
    set_steps(page, 2)
    for button, said in (("Compare stages", "pictures of"), ("Show attention to it", "the more the student reads"), ("Walk", "An animation")):
        page.get_by_role("button", name=button).click()
        page.locator(".snapgen .closer figcaption", has_text=said).wait_for(timeout=60_000)
    page.get_by_role("button", name="Generate").click()
    ready(page)
    page.screenshot(path=SHOTS / "closer.png", full_page=True)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").last.click()
    assert Image.open(download.value.path()).text["software"] == "snapgen"
    page.get_by_label("Prompt", exact=True).fill("a dog")
    page.get_by_role("button", name="Draw again").first.click()
    sync_api.expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red apple")


@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits(visit, width):
    page = visit(width, 900)
    page.evaluate(CLICK)
    ready(page)
    page.screenshot(path=SHOTS / f"width-{width}.png")
    wide = page.evaluate("Math.max(...[...document.querySelectorAll('.snapgen, .snapgen *')].filter(e => e.offsetParent).map(e => e.getBoundingClientRect().right))")
    assert wide <= width + 1, "something sticks out"


def test_visitors_get_their_own_and_the_next_waits(visit, engine):
    first, second, third = (visit() for _ in range(VISITORS))
    fourth = visit(ready=False)
    assert "Please wait" in fourth.inner_text("body") and "every ten seconds" in fourth.inner_text("body")
    fourth.screenshot(path=SHOTS / "full.png")
    for seed, page in enumerate((first, second, third)):
        page.get_by_label("Stage", exact=True).select_option("base")
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.keyboard.press("Tab")
    for page in (first, second, third):
        page.get_by_role("button", name="Generate").click(no_wait_after=True)
    for page in (first, second, third):
        ready(page)
    for seed, page in enumerate((first, second, third)):
        wanted = next(event for event in engine.run(Task("draw", Order("a red apple", seed, stage="base"))) if event.kind == "picture")
        assert shown(page) == [wanted.data]
    leave(third)
    fourth.get_by_role("button", name="Generate").wait_for(timeout=60_000)  # it came by itself


def test_no_code_runs_for_a_page(visit, demo):
    """Voila hands on messages of widgets, and nothing that executes; nor any file."""
    visit()
    for path in ("voila/files/SnapGen%20studio.ipynb", "api/contents", "lab"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(demo.url + path, timeout=20)


def test_in_jupyterlab(browser, tmp_path):
    port = free_port()
    for _ in served([sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.port_retries=0", f"--LabApp.workspaces_dir={tmp_path}"], f"http://localhost:{port}/api"):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"http://localhost:{port}/lab/tree/notebooks/08_generate.ipynb", timeout=90_000)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
        page.get_by_text("Python 3 (ipykernel) | Idle").or_(page.get_by_title(re.compile("Idle"))).first.wait_for(timeout=60_000)
        page.locator(".jp-Notebook .jp-Cell").first.click(position={"x": 4, "y": 4})
        for _ in range(5):  # down to the studio's cell
            page.keyboard.press("Shift+Enter")
        page.get_by_role("button", name="Generate").wait_for(timeout=90_000)
        page.get_by_role("button", name="Generate").scroll_into_view_if_needed()
        page.evaluate(CLICK)
        ready(page)
        page.screenshot(path=SHOTS / "lab.png")
        assert len(shown(page)) == 1
        page.close()
