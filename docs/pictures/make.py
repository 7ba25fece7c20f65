"""Makes the pictures of the documentation: `python docs/pictures/make.py`.

Timelines are simulated but for one: recorded.csv has a run that `record.py` recorded.
"""

import contextlib
import csv
import pathlib
import re
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
from fpipe.schedules import (
    NAMES,
    Action,
    Costs,
    Event,
    Schedule,
    Timeline,
    early_recompute,
    named,
    offload,
    simulate,
    svg,
    zero_bubble,
)

HERE = pathlib.Path(__file__).parent
DEVICES, MICROBATCHES = 4, 8
SCALE = 22  # pixels for a unit of time
# Those of longer timelines, so that none is wider than a page. What is compared has one
# scale.
SCALES = {
    "1f1b_latency": 20,
    "eager_1f1b_latency": 20,
    "recompute_late": 18,
    "recompute_early": 18,
    "launch": 15,
}
BESIDE = 88  # pixels for the names of the devices and the margins
# what the forwards of a whole batch take on a device, in the pictures of
# docs/concepts.md
BATCH = 16


def at_unit_costs(schedule: Schedule, transfer: float = 0.0) -> Timeline:
    """The timeline where `F`, `I` and `W` are 1 for all the stages of a device
    together.
    """
    each = schedule.devices / schedule.stages
    return simulate(schedule, Costs(F=each, I=each, W=each, transfer=transfer))


def schedules() -> dict[str, Timeline]:
    """What is drawn for docs/schedules.md, by the name of the file."""
    made = {name: at_unit_costs(named(name, DEVICES, MICROBATCHES)) for name in NAMES}
    for name in ("1f1b", "eager_1f1b"):
        made[f"{name}_latency"] = at_unit_costs(
            named(name, DEVICES, MICROBATCHES), transfer=0.25
        )
    whole = named("1f1b", DEVICES, MICROBATCHES)
    made["recompute_late"] = recomputing(1)
    made["recompute_early"] = simulate(early_recompute(whole))
    copying = Costs(offload=1)
    eager = named("eager_1f1b", DEVICES, MICROBATCHES)
    made["offload"] = simulate(offload(eager, memory=4, costs=copying), copying)
    made["launch"] = simulate(eager, Costs(launch=0.75))
    made["zero_bubble"] = at_unit_costs(zero_bubble(DEVICES, MICROBATCHES, memory=3))
    return made


def one_batch(microbatches: int) -> Timeline:
    """The same batch in so many pieces."""
    each = BATCH / microbatches
    return simulate(named("gpipe", DEVICES, microbatches), Costs(F=each, B=2 * each))


def recomputing(forward: float) -> Timeline:
    """1F1B, whose backwards take `forward` longer."""
    return simulate(named("1f1b", DEVICES, MICROBATCHES), Costs(F=1, B=2 + forward))


def from_csv(name: str, rows: list[dict[str, str]]) -> Timeline:
    """One of the timelines of recorded.csv."""
    events = tuple(
        Event(
            device=int(row["device"]),
            action=Action(
                cast("Any", row["kind"]), int(row["stage"]), int(row["microbatch"])
            ),
            start=float(row["start"]),
            end=float(row["end"]),
        )
        for row in rows
        if row["timeline"] == name
    )
    return Timeline(events, 1 + max(event.device for event in events), name)


def recorded() -> str:
    """A recorded step over its prediction."""
    with (HERE / "recorded.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    timelines = [from_csv(name, rows) for name in ("recorded", "predicted")]
    return svg(timelines[0], width=700, over=timelines[1])


def drawn(scale: float, timelines: dict[str, Timeline]) -> dict[str, str]:
    """SVGs to one scale: pixels for a unit of time."""
    return {
        f"{name}.svg": svg(timeline, width=BESIDE + round(scale * timeline.makespan))
        for name, timeline in timelines.items()
    }


def cut_graphs() -> dict[str, str]:
    """The functions that docs/cutting.md splits, by the code of that page."""
    text = (HERE.parent / "cutting.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        # The page adds a bias to each row, which tests of the library may not.
        with contextlib.redirect_stdout(None), jax.numpy_rank_promotion("allow"):
            exec(block, names)
    return {
        "cut_u_net.svg": names["u_net_split"].to_svg(),
        "cut_gpt.svg": names["gpt_split"].to_svg(),
    }


def shards() -> dict[str, str]:
    """The parameters of two layers on two stages of two devices, in three ways."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    own = {"up": np.zeros((8, 32), np.float32), "down": np.zeros((32, 8), np.float32)}
    ways = {
        "rows": ("data", None),
        "fully_sharded": ("data", {"up": P(None, "data"), "down": P("data")}),
        "tensor_parallel": ("model", {"up": P(None, "model"), "down": P("model")}),
    }
    drawings = {}
    for way, (axis, spec) in ways.items():
        layer = fpipe.Layer(lambda params, x: x, name="mlp", spec=spec)
        mesh = Mesh(devices, ("stage", axis))
        pipe = fpipe.Pipe([layer, layer], mesh=mesh)
        params = pipe.place((own, own))
        stages = {f"stage {k}": tree for k, tree in enumerate(params)}
        drawings[f"shards_{way}.svg"] = fpipe.shards_svg(stages)
    return drawings


def pictures() -> dict[str, str]:
    """All pictures, by the name of the file."""
    pieces = {f"microbatches_{m}": one_batch(m) for m in (1, 4, 16)}
    remat = {"remat_never": recomputing(0), "remat_always": recomputing(1)}
    return {
        **{
            file: text
            for name, timeline in schedules().items()
            for file, text in drawn(SCALES.get(name, SCALE), {name: timeline}).items()
        },
        **drawn(4, pieces),
        **drawn(17, remat),
        "recorded.svg": recorded(),
        **shards(),
        **cut_graphs(),
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    for name, text in pictures().items():
        (HERE / name).write_text(text, encoding="utf-8")
