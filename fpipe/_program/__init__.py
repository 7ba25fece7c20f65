"""A stage's programs: flat forwards and backwards, cut out of one trace.

The layers are traced once for microbatches of one shape (`flatten`). Differentiating that gives a joint graph of forward
and backward (`differentiate`), which is cut (`cut`) so that the forward hands over the values that depend on the
microbatch and that the backward cannot have otherwise: no inputs, and nothing made from parameters alone. A backward may
be cut once more, into the halves `I` and `W`.
"""

from fpipe._program._code import Code as Code
from fpipe._program._code import Program as Program
from fpipe._program._code import Ref as Ref
from fpipe._program._code import Window as Window
from fpipe._program._cut import Options as Options
from fpipe._program._cut import StagePrograms as StagePrograms
from fpipe._program._cut import cut as cut
from fpipe._program._trace import Flat as Flat
from fpipe._program._trace import Joint as Joint
from fpipe._program._trace import differentiate as differentiate
from fpipe._program._trace import flatten as flatten
from fpipe._program._trace import forward_alone as forward_alone
