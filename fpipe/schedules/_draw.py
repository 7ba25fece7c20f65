"""A timeline as text: one line per device, one column per unit of time."""

from fpipe.schedules._schedule import Schedule
from fpipe.schedules._simulate import Timeline, simulate


def draw(what: Schedule | Timeline, width: int = 120) -> str:
    """Draw a schedule, or a timeline, for a terminal.

    Each box is as wide as its action is long; `F3` is the forward of microbatch 3. Where a device
    has several stages the stage stands before the letter.

    Arguments:
        what: a `Schedule` (drawn with a forward of 1 and a backward of 2) or a `Timeline`.
        width: at most this many characters a line; what does not fit is cut with `…`.
    """
    timeline = simulate(what) if isinstance(what, Schedule) else what
    stages = {(e.device, e.action.stage) for e in timeline.events}
    several = len(stages) > timeline.devices
    labels = [f"{e.action.stage if several else ''}{e.action.kind}{e.action.microbatch}" for e in timeline.events]
    start = min(e.start for e in timeline.events)
    # The scale at which the tightest label still fits in its box, with one character between boxes.
    widths = [(len(t) + 1) / (e.end - e.start) for t, e in zip(labels, timeline.events, strict=True) if e.end > e.start]
    scale = max(widths, default=1.0)
    end = round(timeline.makespan * scale)
    lines = [[" "] * (end + 1) for _ in range(timeline.devices)]
    for label, e in zip(labels, timeline.events, strict=False):
        a, b = round((e.start - start) * scale), round((e.end - start) * scale)
        box = label.ljust(max(b - a - 1, 0), "-")[: max(b - a - 1, 1)]
        lines[e.device][a : a + len(box)] = box
    head = len(str(timeline.devices - 1)) + len("device  ")
    out = []
    for d, line in enumerate(lines):
        text = f"device {d}".ljust(head) + "".join(line).rstrip()
        out.append(text if len(text) <= width else text[: width - 1] + "…")
    out.append(
        f"{timeline.name}: makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%}, "
        f"peak live microbatches {', '.join(map(str, timeline.peak_live))}"
    )
    return "\n".join(out)
