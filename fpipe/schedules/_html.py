"""HTML that notebooks show.

A notebook asks what it shows for `_repr_html_`. Schedules and timelines answer with
`as_html(self)`, which those who can draw them add to: drawings know schedules, and
schedules do not know drawings.

    as_html(schedule)   <svg …>…</svg>, by `_draw/html.py`
    as_html("F0 < B0")  <pre …>F0 &lt; B0</pre>, as for everything that nobody draws

All of it stands for itself: no script, no style sheet, nothing from elsewhere. Text has
the notebook's own colours, light or dark.
"""

import functools
import html
import re

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Lines are not broken, or the columns of a drawing would not stand below each other.
PRE = "line-height:1.25;white-space:pre;overflow-x:auto"


@functools.singledispatch
def as_html(what: object) -> str:
    """What a notebook shows."""
    return preformatted(str(what))


def preformatted(text: str) -> str:
    """Text in columns."""
    return f'<pre style="{PRE}">{escape(text)}</pre>'


def escape(text: str) -> str:
    """Text that may stand in HTML and in SVG."""
    # A schedule's name may have any character; XML refuses some even when escaped.
    return html.escape(NOT_XML.sub("\ufffd", text))
