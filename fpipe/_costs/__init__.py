"""What layers cost: their work, what they keep and what goes between them, layer by layer, from shapes.

The model is walked once (`_walk`): each layer is traced and differentiated as a stage of its own, as the executors would do
it, and layers that are equal once for all. FLOPs are counted in the lowered programs (`_flops`), time is measured on a device
(`_time`), and `_layers` puts it all into one record.
"""

from fpipe._costs._layers import UNITS as UNITS
from fpipe._costs._layers import By as By
from fpipe._costs._layers import costs_of as costs_of
from fpipe._costs._layers import layer_costs as layer_costs
from fpipe._costs._record import LayerCosts as LayerCosts
from fpipe._costs._record import Sent as Sent
