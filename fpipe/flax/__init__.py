"""Flax modules as fpipe layers.

`pip install "fpipe[flax]"`, and `import fpipe.flax` to use it.

    layer, layers, tied       from modules to `fpipe.Layer`s
    split_variables,          from the variables of a whole Flax model to those of its
    merge_variables           layers, and back (checkpoints)
    Parameters                from the parameters of a pipe to an NNX module
    stream_key                the key of a random stream, for tests by hand

After the import, `flax.serialization` saves an `fpipe.Packed` by layer
(`_serialization.py`).
"""

from fpipe.flax._layers import layer as layer
from fpipe.flax._layers import layers as layers
from fpipe.flax._layers import tied as tied
from fpipe.flax._optimizer import Parameters as Parameters
from fpipe.flax._serialization import register as _register
from fpipe.flax._streams import stream_key as stream_key
from fpipe.flax._variables import merge_variables as merge_variables
from fpipe.flax._variables import split_variables as split_variables

_register()
