"""Schedules are data: which device works on which (stage, microbatch), in which order. No JAX here."""

from fpipe.schedules._draw import draw as draw
from fpipe.schedules._generators import eager_1f1b as eager_1f1b
from fpipe.schedules._generators import gpipe as gpipe
from fpipe.schedules._generators import one_f_one_b as one_f_one_b
from fpipe.schedules._names import NAMES as NAMES
from fpipe.schedules._names import named as named
from fpipe.schedules._schedule import Action as Action
from fpipe.schedules._schedule import Kind as Kind
from fpipe.schedules._schedule import Schedule as Schedule
from fpipe.schedules._simulate import Costs as Costs
from fpipe.schedules._simulate import Event as Event
from fpipe.schedules._simulate import Timeline as Timeline
from fpipe.schedules._simulate import simulate as simulate
