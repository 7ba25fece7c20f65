"""Flax modules as fpipe layers: `import fpipe.flax` to use it; it needs `pip install
"fpipe[flax]"`.
"""

from fpipe.flax._layers import layer as layer
from fpipe.flax._layers import layers as layers
from fpipe.flax._layers import tied as tied
from fpipe.flax._optimizer import Parameters as Parameters
from fpipe.flax._streams import stream_key as stream_key
from fpipe.flax._variables import merge_variables as merge_variables
from fpipe.flax._variables import split_variables as split_variables
