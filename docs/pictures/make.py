"""Makes the pictures of docs/schedules.md: `python docs/pictures/make.py`."""

import pathlib

from fpipe.schedules import NAMES, Costs, Schedule, Timeline, named, simulate, svg, zero_bubble

DEVICES, MICROBATCHES = 4, 8
SCALE = 22  # pixels for a unit of time
BESIDE = 88  # pixels for the names of the devices and the margins


def at_unit_costs(schedule: Schedule, transfer: float = 0.0) -> Timeline:
    """The timeline where `F`, `I` and `W` are 1 for all the stages of a device together."""
    each = schedule.devices / schedule.stages
    return simulate(schedule, Costs(F=each, I=each, W=each, transfer=transfer))


def timelines() -> dict[str, Timeline]:
    """What is drawn, by the name of the file."""
    made = {name: at_unit_costs(named(name, DEVICES, MICROBATCHES)) for name in NAMES}
    for name in ("1f1b", "eager_1f1b"):
        made[f"{name}_latency"] = at_unit_costs(named(name, DEVICES, MICROBATCHES), transfer=0.25)
    made["zero_bubble"] = at_unit_costs(zero_bubble(DEVICES, MICROBATCHES, memory=3))
    return made


def pictures() -> dict[str, str]:
    """All pictures, as SVG, to one scale."""
    return {
        f"{name}.svg": svg(timeline, width=BESIDE + round(SCALE * timeline.makespan))
        for name, timeline in timelines().items()
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (pathlib.Path(__file__).parent / name).write_text(text, encoding="utf-8")
