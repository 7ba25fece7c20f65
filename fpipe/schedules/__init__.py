"""Schedules are data: for each device, which (stage, microbatch) it works on, in order.

In: sizes, or rows of actions. Out: a `Schedule`, which can be simulated, drawn, written
to CSV, and given to a `Pipe`:

    schedule = fpipe.schedules.gpipe(devices=2, microbatches=2)
    print(fpipe.schedules.draw(schedule))

    device 0 F0 F1          B0--- B1---
    device 1    F0 F1 B0--- B1---
    gpipe: makespan 9, bubble 33.3%, peak live microbatches 2, 2

This package does not import JAX.
"""

from fpipe.schedules._action import Action as Action
from fpipe.schedules._action import Kind as Kind
from fpipe.schedules._costs import Costs as Costs
from fpipe.schedules._csv import from_csv as from_csv
from fpipe.schedules._draw.html import html as html
from fpipe.schedules._draw.svg import svg as svg
from fpipe.schedules._draw.text import draw as draw
from fpipe.schedules._early_recompute import early_recompute as early_recompute
from fpipe.schedules._generators.looped import eager_1f1b as eager_1f1b
from fpipe.schedules._generators.looped import forward_only as forward_only
from fpipe.schedules._generators.looped import gpipe as gpipe
from fpipe.schedules._generators.looped import interleaved_1f1b as interleaved_1f1b
from fpipe.schedules._generators.looped import looped_bfs as looped_bfs
from fpipe.schedules._generators.looped import one_f_one_b as one_f_one_b
from fpipe.schedules._generators.looped import zb_h1 as zb_h1
from fpipe.schedules._generators.looped import zb_h2 as zb_h2
from fpipe.schedules._generators.v_shaped import dualpipe_v as dualpipe_v
from fpipe.schedules._generators.v_shaped import v_half as v_half
from fpipe.schedules._generators.v_shaped import v_min as v_min
from fpipe.schedules._generators.v_shaped import zb_v as zb_v
from fpipe.schedules._names import NAMES as NAMES
from fpipe.schedules._names import named as named
from fpipe.schedules._offload import offload as offload
from fpipe.schedules._recording import ProgramRun as ProgramRun
from fpipe.schedules._recording import Recording as Recording
from fpipe.schedules._recording import Transfer as Transfer
from fpipe.schedules._schedule import Schedule as Schedule
from fpipe.schedules._search.zero_bubble import zero_bubble as zero_bubble
from fpipe.schedules._simulate import simulate as simulate
from fpipe.schedules._timeline import Event as Event
from fpipe.schedules._timeline import Launch as Launch
from fpipe.schedules._timeline import Timeline as Timeline
