"""A timeline as HTML, for notebooks and reports.

A small one is the SVG document. A large one would have a box for each of 10^5 actions,
so it is text: the first columns of the first devices, and the caption.

    device 0  F0 F1 F2 F3 …
    device 1     F0 F1 F2 …
    and 62 more devices
    1f1b: makespan 6189, bubble 3.1%, peak live microbatches 64, 63, 62, 61, …
"""

from fpipe.schedules._draw.picture import picture
from fpipe.schedules._draw.svg import svg
from fpipe.schedules._draw.text import draw
from fpipe.schedules._html import as_html, preformatted
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._simulate import simulate
from fpipe.schedules._timeline import Timeline

# The most that is drawn: each limit keeps a document below 200 KB, so that a notebook
# with many of them can be saved.
ACTIONS = 1000
NAME = 200
DEVICES = 32
WIDTH = 120
CAPTION = 600


def html(what: Schedule | Timeline) -> str:
    """Draw a schedule, or a timeline, as HTML. Notebooks show this drawing.

    Up to 1000 actions it is the drawing of `svg`. For more it is the beginning of the
    drawing of `draw`, so the size of the HTML is bounded.

    Arguments:
        what: a `Schedule` or a `Timeline`. In a schedule a forward takes 1 unit of time
            and a backward 2.

    Returns:
        The HTML, without scripts or style sheets.

    Raises:
        TypeError: `what` is neither a `Schedule` nor a `Timeline`.
        ValueError: the timeline has no events.
    """
    timeline = simulate(what) if isinstance(what, Schedule) else what
    if not isinstance(timeline, Timeline) or not timeline.events:
        draw(timeline)  # says what is wrong with it
    if len(timeline.events) <= ACTIONS and len(timeline.name) <= NAME:
        return svg(timeline)
    lines = draw(timeline, WIDTH).splitlines()
    count = len(picture(timeline, "html").rows)
    rows, caption = lines[:count], " ".join(lines[count:])
    if len(rows) > DEVICES:
        more = "devices" if count == timeline.devices else "rows"
        rows = [*rows[:DEVICES], f"and {len(rows) - DEVICES} more {more}"]
    if len(caption) > CAPTION:
        caption = f"{caption[: CAPTION - 1]}…"
    return preformatted("\n".join([*rows, caption]))


as_html.register(Schedule, html)


@as_html.register
def _(what: Timeline) -> str:
    # A recording is empty until its block ends, and a notebook may show it before.
    return html(what) if what.events else preformatted(repr(what))
