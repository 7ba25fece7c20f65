"""fpipe: pipeline-parallel training for JAX as pure functions."""

from fpipe import schedules as schedules
from fpipe._balancing import balance as balance
from fpipe._batch_norm import DeferredBatchNorm as DeferredBatchNorm
from fpipe._costs import LayerCosts as LayerCosts
from fpipe._costs import layer_costs as layer_costs
from fpipe._layer import Layer as Layer
from fpipe._layer import fn as fn
from fpipe._layer import skippable as skippable
from fpipe._microbatch import NoChunk as NoChunk
from fpipe._model import verify_skippables as verify_skippables
from fpipe._pipe import Pipe as Pipe
from fpipe._prediction import Prediction as Prediction
from fpipe._record import record as record
from fpipe._scan import Packed as Packed
from fpipe._sequential import sequential as sequential
from fpipe._skip import Namespace as Namespace
from fpipe._skip import peek as peek
from fpipe._skip import pop as pop
from fpipe._skip import stash as stash
from fpipe._tune import Candidate as Candidate
from fpipe._tune import Tuning as Tuning
from fpipe._tune import tune as tune
