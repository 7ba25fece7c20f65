"""What a call will take, before it runs: its stages, the schedule under their work, memory, and advice."""

from fpipe._prediction._data import Crossing as Crossing
from fpipe._prediction._data import DeviceRow as DeviceRow
from fpipe._prediction._data import Prediction as Prediction
from fpipe._prediction._data import StageRow as StageRow
from fpipe._prediction._data import quantity as quantity
from fpipe._prediction._data import size as size
from fpipe._prediction._data import table as table
from fpipe._prediction._predict import By as By
from fpipe._prediction._predict import Options as Options
from fpipe._prediction._predict import mean_square as mean_square
from fpipe._prediction._predict import predict as predict
