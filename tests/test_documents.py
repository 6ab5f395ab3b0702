"""What people read: README, data cards and notebooks say what is true, and the notebooks are built as they should be."""

import ast
import csv
import json
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pyarrow.parquet
import pytest
import torch

from snapgen_core.cli import build_parser
from snapgen_core.decoder import TinyDecoder
from snapgen_core.profile import count_macs, count_parameters
from snapgen_core.scenes import CLASSES, COLOURS, held_out_pairs
from snapgen_core.unet import SnapGenUNet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CARDS = [ROOT / "README.md", ROOT / "data" / "emoji" / "README.md", ROOT / "data" / "photos" / "README.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = {"SCALE", "SEED", "RUN_DIR", "TRAIN"}
ABSOLUTE = re.compile(r"(?<![\w./:-])(?:/(?:home|Users|root|tmp|mnt|opt|workspace|content)/|[A-Z]:\\)")


def links(text: str) -> list[tuple[str, str]]:
    """(text or alt text, target) of every Markdown link and image that leads to a file."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", without_code)
    return [(label, target.partition("#")[0]) for label, target in found if not re.match(r"https?:|mailto:|#", target)]


# ------------------------------------------------------------------------------------------------- README and cards


@pytest.mark.parametrize("path", CARDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    missing = [target for _, target in links(path.read_text("utf-8")) if not (path.parent / target).exists()]
    assert missing == []


def test_images_have_alt_text():
    images = re.findall(r"!\[([^\]]*)\]\(", README)
    assert images and all(len(alt) > 40 for alt in images)


def test_every_notebook_is_there_or_marked_as_coming():
    lines = [line for line in README.splitlines() if line.startswith("| ") and re.search(r"\b\d\d_[a-z]", line)]
    named = {re.search(r"\b\d\d_[a-z_]+", line)[0]: line for line in lines}
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in named.get(path.stem, ""), f"README does not link {path.name}"
    for name, line in named.items():
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists() != ("(to come)" in line), line


def test_commands_in_the_readme_can_be_typed():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    typed = [words[1:] for words in commands if words and words[0] == "snapgen"]
    assert {words[0] for words in typed} == {"run", "train", "generate", "evaluate", "prepare", "export", "demo", "bench", "doctor"}
    for words in typed:
        build_parser().parse_args(words)
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README))
    assert {"run", "test", "checkpoints"} <= targets
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_layout_names_what_exists():
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    for name in re.findall(r"\b[a-z_]+\.py\b|\b[a-z_]+/", layout):
        places = [ROOT / name, ROOT / "snapgen_core" / name, ROOT / "data" / name, ROOT / "exports" / name]
        assert name == "runs/" or any(place.exists() for place in places), name


def counted(preset: str, what: str) -> float:
    """Parameters in millions, or GMACs: of a UNet at a 32x32 latent with CLIP-L's 77 tokens, of a decoder at 128x128."""
    with torch.device("meta"):
        if preset.startswith("decoder/"):
            decoder = TinyDecoder.from_preset(preset.removeprefix("decoder/"))
            return count_parameters(decoder) / 1e6 if what == "parameters" else count_macs(decoder, torch.zeros(1, 16, 128, 128)) / 1e9
        unet = SnapGenUNet.from_preset(preset)
        if what == "parameters":
            return count_parameters(unet) / 1e6
        latent, context = torch.zeros(1, unet.config.in_channels, 32, 32), torch.zeros(1, 77, unet.config.context_dim)
        return count_macs(unet, latent, torch.zeros(1), context) / 1e9


@pytest.mark.parametrize(("shown", "preset", "what"), re.findall(r"(\S+) <!-- counted: (\S+) (\S+) -->", README))
def test_counted_figures(shown, preset, what):
    assert shown == f"{counted(preset, what):.{max(1, len(shown.partition('.')[2]))}f}"


def looked_up(content, key: str) -> float:
    """What lies at `key`: names joined by dots, of dictionaries' keys (which may have dots too) and of a list's items."""
    if isinstance(content, dict) and key in content:
        return content[key]
    part, _, rest = key.partition(".")
    return looked_up(content[part] if isinstance(content, dict) else next(item for item in content if item["name"] == part), rest)


@pytest.mark.parametrize(("shown", "name", "key"), re.findall(r"(\S+) <!-- measured: (\S+) (\S+) -->", README))
def test_measured_figures(shown, name, key):
    """A figure in the README is the one in exports/results, rounded; without a result there is a dash."""
    path = ROOT / "exports" / "results" / f"{name}.json"
    if not path.exists():
        assert shown == "–", f"there is no {path.name}"
        return
    value = looked_up(json.loads(path.read_text("utf-8")), key)
    decimals = len(shown.partition(".")[2]) if "." in shown else 2
    assert shown == f"{value:.{decimals}f}", f"{path.name} says {key} = {value}"


def test_results_name_their_command():
    for path in (ROOT / "exports" / "results").glob("*.json"):
        assert json.loads(path.read_text("utf-8")).get("command"), path.name


def test_the_emoji_card_counts_right():
    card = CARDS[1].read_text("utf-8")
    table = pyarrow.parquet.read_table(ROOT / "data" / "emoji" / "fluent3d_128_rgba.parquet", columns=["group", "split"])
    groups, splits = Counter(table["group"].to_pylist()), Counter(table["split"].to_pylist())
    assert dict(re.findall(r"^\| ([a-z& ]+) \| (\d+) \|$", card, re.MULTILINE)) == {name: str(count) for name, count in groups.items()}
    colour_pairs, object_pairs = held_out_pairs()
    facts = (f"{table.num_rows:,} sprites", f"`train` ({splits['train']:,})", f"`val` ({splits['val']})",
             f"{len(CLASSES)} object classes", f"{len(colour_pairs)} object-colour pairs", f"{len(object_pairs)} object-object pairs")
    assert [fact for fact in facts if fact not in card] == []
    assert f"{len(CLASSES)} kinds of objects" in README and f"{splits['train']:,} emoji" in README and len(COLOURS) == 8


def test_the_photo_card_counts_right():
    folder, card = ROOT / "data" / "photos", CARDS[2].read_text("utf-8")
    with open(folder / "ATTRIBUTION.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {path.name for path in folder.glob("*.webp")}
    licences = Counter(row["licence"].replace("CC0-1.0", "CC0") for row in rows)
    assert dict(re.findall(r"^\| ([^|]+) \| (\d+) \|$", card, re.MULTILINE)) == {name: str(count) for name, count in licences.items()}
    assert f"{sum(bool(row['caption']) for row in rows)} of the photos have" in card


# ------------------------------------------------------------------------------------------------- notebooks


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(str(path), as_version=4)


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown_text(output) -> dict[str, str]:
    """Everything textual in an output by kind, pixels left out."""
    texts = {kind: content for kind, content in output.get("data", {}).items() if isinstance(content, str)}
    texts["stream"] = output.get("text", "")
    return {kind: re.sub(r"base64,[\w+/=]+", "", text) for kind, text in texts.items()}


class _Images(HTMLParser):
    """The alt texts of all images, and the number of captions that say something."""

    def __init__(self, html: str):
        super().__init__()
        self.alts: list[str | None] = []
        self.captions, self._inside = 0, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.alts.append(dict(attributes).get("alt"))
        self._inside = tag == "figcaption"

    def handle_data(self, data):
        self.captions += self._inside and bool(data.strip())
        self._inside = False


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {"00_start_here", "03_flow_matching"} <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_format(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@every_notebook
def test_parameters_are_literals(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]
    values = {}
    for line in ast.parse(tagged[0].source).body:
        assert isinstance(line, ast.Assign) and len(line.targets) == 1, ast.unparse(line)
        values[line.targets[0].id] = ast.literal_eval(line.value)  # ValueError where it is no literal
    assert PARAMETERS <= set(values)
    assert values["SCALE"] == "tiny" and values["RUN_DIR"] == "" and isinstance(values["SEED"], int)


@every_notebook
def test_first_and_last_cell(path):
    cells = read(path).cells
    first, last = cells[0], [cell for cell in cells[-2:] if cell.cell_type == "markdown"][-1]  # a cell may tell the time taken
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    for needed in (r"\bSec\.|\bFig\.", r"[Bb]efore", r"minute|second", r"memory|GB"):
        assert re.search(needed, first.source), f"the first cell says nothing about {needed}"
    assert re.search(r"(?i)where to go next", last.source)


@every_notebook
def test_table_and_exercises(path):
    notebook = read(path)
    assert any("published (paper scale)" in shown_text(output).get("text/plain", "") for output in outputs(notebook))
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert [n for n in "123" if not re.search(rf"(?i)exercise {n}\b", prose)] == []
    assert prose.count("<details>") == prose.count("</details>") >= 3
    unanswered = [output for output in outputs(notebook) if shown_text(output).get("text/plain", "").startswith("Not yet:")]
    assert len(unanswered) >= 3


@every_notebook
def test_committed_as_executed(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom and save it"
    assert "papermill" not in notebook.metadata, "commit the notebook itself, executed, not the copy of `snapgen run`"
    kinds = Counter(output.output_type for cell in code for output in cell.outputs)
    assert kinds["error"] == 0
    warnings = [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert warnings == []


@every_notebook
def test_figures_have_alt_text_and_a_caption(path):
    notebook = read(path)
    assert not [1 for output in outputs(notebook) if any(kind.startswith("image/") for kind in output.get("data", {}))], "show pictures with figures.Figure"
    figures = [_Images(output.data["text/html"]) for output in outputs(notebook) if "<img" in output.get("data", {}).get("text/html", "")]
    assert figures
    for figure in figures:
        assert all(alt and len(alt) > 20 for alt in figure.alts)
        assert figure.captions >= len(figure.alts), f"no caption: {figure.alts}"


@every_notebook
def test_no_path_of_one_machine(path):
    notebook = read(path)
    texts = [cell.source for cell in notebook.cells]
    texts.append(json.dumps([notebook.metadata, *(cell.metadata for cell in notebook.cells)]))
    texts += [text for output in outputs(notebook) for text in shown_text(output).values()]
    for text in texts:
        assert not ABSOLUTE.search(text) and str(Path.home()) + "/" not in text and str(ROOT) not in text, text[:300]


@every_notebook
def test_links_in_notebooks_lead_somewhere(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert [target for _, target in links(prose) if not (path.parent / target).exists()] == []


def test_notebooks_are_compared_without_pixels():
    """Figures are HTML, which nbval compares letter by letter; another CPU would fail on the last bit of a picture."""
    assert "--nbval-sanitize-with tests/nbval.cfg" in (ROOT / "Makefile").read_text()
    pattern = re.search(r"^regex: (.*)$", (ROOT / "tests" / "nbval.cfg").read_text(), re.MULTILINE)[1]
    from PIL import Image

    from snapgen_core.figures import Figure

    one, other = (Figure(Image.new("RGB", (4, 4), colour), alt="a square", caption="see")._repr_html_() for colour in ("red", "blue"))
    assert one != other and re.sub(pattern, "PNG", one) == re.sub(pattern, "PNG", other)
    assert 'alt="a square"' in re.sub(pattern, "PNG", one)
