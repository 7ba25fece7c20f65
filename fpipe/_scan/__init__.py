"""The scan executor: the whole step as one program, a `lax.scan` over ticks inside `jax.shard_map`."""

from fpipe._scan._calls import Scan as Scan
from fpipe._scan._mesh import AXIS as AXIS
from fpipe._scan._mesh import as_mesh as as_mesh
from fpipe._scan._mesh import stage_devices as stage_devices
from fpipe._scan._packing import Packed as Packed
