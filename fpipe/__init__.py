"""fpipe: pipeline-parallel training for JAX as pure functions."""

from fpipe import schedules as schedules
from fpipe._executors.recording import record as record
from fpipe._executors.scan.packing import Packed as Packed
from fpipe._executors.sequential import sequential as sequential
from fpipe._model.batch_norm import DeferredBatchNorm as DeferredBatchNorm
from fpipe._model.layer import Layer as Layer
from fpipe._model.layer import fn as fn
from fpipe._model.layer import skippable as skippable
from fpipe._model.skip_routes import verify_skippables as verify_skippables
from fpipe._model.skips import Namespace as Namespace
from fpipe._model.skips import peek as peek
from fpipe._model.skips import pop as pop
from fpipe._model.skips import stash as stash
from fpipe._model.wrappers import Chunk as Chunk
from fpipe._model.wrappers import Microbatches as Microbatches
from fpipe._model.wrappers import NoChunk as NoChunk
from fpipe._model.wrappers import PerRow as PerRow
from fpipe._pipe import Pipe as Pipe
from fpipe._planning.balance import balance as balance
from fpipe._planning.costs import LayerCosts as LayerCosts
from fpipe._planning.layer_costs import layer_costs as layer_costs
from fpipe._planning.prediction import Prediction as Prediction
from fpipe._tune import Candidate as Candidate
from fpipe._tune import Tuning as Tuning
from fpipe._tune import tune as tune
