"""What notebooks show: pictures with alt text, grids of images, and published figures beside measured ones."""

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import UserError
from .files import atomic_write
from .paths import data_dir


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
    buffer = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(buffer, "PNG")
    else:
        import matplotlib.pyplot as plt

        image.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(image)
    return buffer.getvalue()


def image_grid(images: Sequence[Image.Image] | Tensor, captions: Sequence[str] = (), columns: int = 8, side: int = 128) -> Image.Image:
    """Pictures (PIL, or a tensor [B, 3, H, W] in [-1, 1]) in rows, each `side` pixels, with its caption below."""
    if isinstance(images, Tensor):
        from .pipeline import to_pil

        images = to_pil(images)
    font = ImageFont.load_default(size=max(10, side // 11))
    wrap = max(8, int(side / (0.52 * font.size)))
    texts = [textwrap.wrap(caption, wrap)[:3] for caption in captions] or [[]] * len(images)
    line = int(font.size * 1.25)
    strip = max((len(t) for t in texts), default=0) * line + (4 if captions else 0)
    gap = max(2, side // 24)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + strip + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(images, texts)):
        x, y = gap + (i % columns) * (side + gap), gap + (i // columns) * (side + strip + gap)
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for k, words in enumerate(text):
            draw.text((x + side / 2, y + side + 2 + k * line), words, fill="#222", font=font, anchor="ma")
    return sheet


def published(table: str) -> dict:
    """A table of the papers, `data/published/<table>.yaml`."""
    path = data_dir() / "published" / f"{table}.yaml"
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


class Comparison:
    """The table that ends a notebook: for each quantity what the paper prints and what was measured, at which scale."""

    def __init__(self, scale: str):
        self.scale = scale
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, what: str, published: object, measured: object, remark: str = "") -> None:
        self.rows.append((what, _figure(published), _figure(measured), remark))

    def _header(self) -> tuple[str, str, str, str]:
        return ("", "published (paper scale)", f"measured ({self.scale})", "remark")

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        return "<table>" + row(self._header(), "th") + "".join(row(r, "td") for r in self.rows) + "</table>"

    def __repr__(self) -> str:
        lines = [self._header(), *self.rows]
        widths = [max(len(r[i]) for r in lines) for i in range(4)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in lines)


def _figure(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
