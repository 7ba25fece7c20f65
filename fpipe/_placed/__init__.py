"""The placed executor: one compiled program per (stage, kind), dispatched asynchronously in the plan's order."""

from fpipe._placed._calls import Placed as Placed
from fpipe._placed._loop import Bound as Bound
from fpipe._placed._loop import observing as observing
from fpipe._placed._tracers import TracedCallError as TracedCallError
from fpipe._placed._tracers import only_shapes as only_shapes
