"""The placed executor: one compiled program per (stage, kind), dispatched asynchronously in the plan's order."""

from fpipe._placed._calls import Placed as Placed
from fpipe._placed._compile import Progress as Progress
from fpipe._placed._compile import as_progress as as_progress
from fpipe._placed._loop import DISPATCH as DISPATCH
from fpipe._placed._loop import Bound as Bound
from fpipe._placed._loop import Dispatch as Dispatch
from fpipe._placed._loop import observing as observing
from fpipe._placed._tracers import TracedCallError as TracedCallError
from fpipe._placed._tracers import only_shapes as only_shapes
