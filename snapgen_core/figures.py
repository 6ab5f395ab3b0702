"""What notebooks show: pictures with alt text, grids of images, and published figures beside measured ones."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import UserError, reason
from .files import atomic_write
from .paths import data_dir, results_dir


class Figure:
    """A picture with alt text and a caption. nbconvert drops image metadata, so notebooks show it as HTML.

    Args:
        image: a matplotlib figure (closed here) or a PIL image.
        alt: what a person who cannot see it needs to know.
        caption: what to look for; shown below.
    """

    def __init__(self, image, alt: str, caption: str = "", width: int | None = None):
        self.png, self.alt, self.caption, self.width = _png(image), alt, caption, width

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        style = f"max-width:100%;width:{self.width}px" if self.width else "max-width:100%"
        below = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure style="margin:0"><img alt="{html.escape(self.alt)}" style="{style}" src="data:image/png;base64,{data}">{below}</figure>'

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def save(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.png)


def _png(image) -> bytes:
    if isinstance(image, Image.Image):
        return to_png(image)
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    image.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(image)
    return buffer.getvalue()


def to_png(image: Image.Image, facts: dict[str, object] | None = None) -> bytes:
    """The file's bytes, with `facts` as its text, so that the picture tells how to draw it again."""
    info = PngInfo()
    for name, value in (facts or {}).items():
        info.add_itxt(name, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def image_grid(images: Sequence[Image.Image] | Tensor, captions: Sequence[str] = (), columns: int = 8, side: int = 128, rows: Sequence[str] = ()) -> Image.Image:
    """Pictures (PIL, or a tensor [B, 3, H, W] in [-1, 1]) row by row, each `side` pixels.

    Args:
        captions: a text for each picture, drawn below it; with `rows`, one for each column, drawn above it.
        rows: a name for each row, drawn on its left.

    Raises:
        ValueError: not one caption for each picture (with `rows`: column), or not one name for each row.
    """
    if isinstance(images, Tensor):
        from .pipeline import to_pil

        images = to_pil(images)
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    if rows and len(rows) != lines or captions and len(captions) != (columns if rows else len(images)):
        raise ValueError(f"{len(images)} pictures in {columns} columns do not go with {len(captions)} captions and {len(rows)} row names")

    font = ImageFont.load_default(size=max(10, side // 11))
    leading = round(1.25 * font.size)
    texts = [_wrap(caption, font, side) for caption in captions]
    names = [_wrap(name, font, side) for name in rows]
    strip = max(map(len, texts), default=0) * leading + 4 * bool(texts)  # for captions, once above or in every row
    margin = max((int(font.getlength(line)) for name in names for line in name), default=0) + 8 * bool(names)
    gap = max(2, side // 24)
    top, pitch = (strip, side + gap) if rows else (0, side + strip + gap)
    sheet = Image.new("RGB", (margin + columns * (side + gap) + gap, top + lines * pitch + gap), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: list[str], x: float, y: float, anchor: str) -> None:
        for k, words in enumerate(text):
            draw.text((x, y + k * leading), words, fill="#222", font=font, anchor=anchor)

    for i, picture in enumerate(images):
        x, y = margin + gap + (i % columns) * (side + gap), top + gap + (i // columns) * pitch
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x, y))
        if texts and (i < columns or not rows):
            text = texts[i]
            write(text, x + side / 2, y - len(text) * leading - 2 if rows else y + side + 2, "ma")
    for i, name in enumerate(names):
        write(name, margin - 2, top + gap + i * pitch + (side - len(name) * leading) / 2, "ra")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words, each at most `width` pixels wide (a longer word has a line of its own)."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def published(table: str) -> dict:
    """A table of the papers, `data/published/<table>.yaml`."""
    path = data_dir() / "published" / f"{table}.yaml"
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def measured(name: str, scale: str) -> dict:
    """A result in `exports/results`, written by the command that it names; empty where `scale` has none."""
    path = results_dir() / f"{name}.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content if content.get("settings", content).get("scale") == scale else {}


class Comparison:
    """The table that ends a notebook: for each quantity what the paper prints and what was measured, at which scale."""

    def __init__(self, scale: str):
        self.scale = scale
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, what: str, published: object, measured: object, remark: str = "") -> None:
        """None is shown as a dash; a measured float with three significant digits, what is published as it is printed."""
        if isinstance(measured, float):
            measured = f"{measured:.3g}"
        self.rows.append((what, *("–" if value is None else str(value) for value in (published, measured)), remark))

    def _header(self) -> tuple[str, str, str, str]:
        return ("", "published (paper scale)", f"measured ({self.scale})", "remark")

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag} style='text-align:left;white-space:pre-wrap'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        return "<table>" + row(self._header(), "th") + "".join(row(r, "td") for r in self.rows) + "</table>"

    def __repr__(self) -> str:
        lines = [self._header(), *self.rows]
        widths = [max(len(r[i]) for r in lines) for i in range(4)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in lines)
