"""What SVG documents are made of.

In: numbers in pixels, and words. Out: elements as text, `rect(0, 0, 9, 9, "#ffffff")`,
and the document around them. There is no script, no style sheet, and no `id` to clash
with others. The ground is white, so that it is legible on light and on dark pages.
"""

from collections.abc import Iterable

from fpipe.schedules._draw.picture import INK
from fpipe.schedules._html import escape

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
SIZE = 12.0  # of the letters, in pixels
LETTER = 0.6  # width of a letter by its size, on the wide side
LINE = 18.0
MARGIN = 12.0


def document(width: float, height: float, caption: str, parts: Iterable[str]) -> str:
    """A document; later parts lie over earlier ones."""
    size = f'width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
        f'aria-label="{escape(caption)}" '
        f'font-family="{FONT}" font-size="{SIZE:g}" fill="{INK}">\n'
        f'<rect width="{width}" height="{height:g}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}" '
        f'fill="{fill}"/>'
    )


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text, `y` its baseline; `style` is more attributes."""
    style = f" {style}" if style else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{style}>{escape(words)}</text>'
