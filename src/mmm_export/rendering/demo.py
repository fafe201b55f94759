"""What `mmm-export demo` shows: pictures in a terminal that has colours, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmm_export.demo import Shown

COLUMNS = 48  # of a picture in the terminal; a character shows two pixels, one above the other
_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.2rem; list-style: none; padding: 0 }
li { border: 1px solid #ccc; border-radius: .4rem; padding: .7rem }
img { width: 100%; image-rendering: pixelated; border-radius: .2rem }
p { margin: .5rem 0 }
.wrong { border: 2px solid #b00020 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 }
  li { border-color: #555 }
  .wrong { border-color: #ff7a8a }
}
"""


def shows_pictures() -> bool:
    """Whether stdout is a terminal that says that it has 24-bit colours."""
    wanted = os.environ.get("COLORTERM", "") in ("truecolor", "24bit") and not os.environ.get("NO_COLOR")
    return wanted and sys.stdout.isatty()


def picture_lines(png: bytes) -> Iterator[str]:
    """Draw a picture in coloured half blocks, line by line."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    rows = max(2, round(image.height * COLUMNS / image.width / 2) * 2)
    image = image.resize((COLUMNS, rows), Image.Resampling.BOX)
    values = image.tobytes()

    def colour(row: int, column: int) -> str:
        start = 3 * (row * COLUMNS + column)
        return ";".join(str(value) for value in values[start : start + 3])

    for row in range(0, rows, 2):
        cells = (f"\x1b[38;2;{colour(row, i)}m\x1b[48;2;{colour(row + 1, i)}m\u2580" for i in range(COLUMNS))
        yield "".join(cells) + "\x1b[0m"


def demo_page(kind: str, shown: Sequence[Shown]) -> str:
    """Write the page: every picture, its question, what the model said, and the truth."""
    right = sum(one.is_right for one in shown)
    cards = "".join(_card(one) for one in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>mmm-export demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>What the {html.escape(kind)} demo model sees</h1>\n"
        "<p>Pictures of the test set: handwriting, photographs and layouts that it never met in training. Answered by the "
        f"exported bundle in ONNX Runtime; {right} of {len(shown)} are right.</p>\n<ul>\n{cards}</ul></body></html>\n"
    )


def _card(one: Shown) -> str:
    data = base64.b64encode(one.picture).decode()
    mark = "\u2713 right" if one.is_right else f"\u2717 wrong, the truth is {html.escape(one.truth)}"
    return (
        f'<li class="{"right" if one.is_right else "wrong"}"><img src="data:image/png;base64,{data}" '
        f'alt="A test picture with handwritten digits"><p>{html.escape(one.question)}</p>'
        f"<p><b>{html.escape(one.said)}</b> <small>{mark}</small></p></li>\n"
    )
