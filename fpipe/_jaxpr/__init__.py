"""What depends on what in a traced function. The one place that reads jaxprs; none constructs them."""

from fpipe._jaxpr._cut import halves as halves
from fpipe._jaxpr._cut import opened as opened
from fpipe._jaxpr._cut import residuals as residuals
from fpipe._jaxpr._graph import Graph as Graph
from fpipe._jaxpr._graph import Node as Node
from fpipe._jaxpr._graph import evaluate as evaluate
from fpipe._jaxpr._graph import function as function
from fpipe._jaxpr._graph import inline as inline
from fpipe._jaxpr._graph import is_late as is_late
from fpipe._jaxpr._graph import is_zero as is_zero
from fpipe._jaxpr._graph import late_values as late_values
from fpipe._jaxpr._graph import masks as masks
from fpipe._jaxpr._graph import needed as needed
from fpipe._jaxpr._graph import trace as trace
from fpipe._jaxpr._identity import identity as identity
from fpipe._jaxpr._inside import bodies as bodies
from fpipe._jaxpr._inside import calls_host as calls_host
from fpipe._jaxpr._inside import loops as loops
from fpipe._jaxpr._inside import rounds as rounds
from fpipe._jaxpr._inside import sources as sources
