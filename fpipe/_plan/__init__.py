"""The plan: a schedule, stages and routes lowered to one ordered list of instructions."""

from fpipe._plan._instructions import Free as Free
from fpipe._plan._instructions import Instruction as Instruction
from fpipe._plan._instructions import Move as Move
from fpipe._plan._instructions import Output as Output
from fpipe._plan._instructions import Plan as Plan
from fpipe._plan._instructions import Role as Role
from fpipe._plan._instructions import Run as Run
from fpipe._plan._instructions import used_later as used_later
from fpipe._plan._lower import lower as lower
from fpipe._plan._programs import Inputs as Inputs
from fpipe._plan._programs import Layout as Layout
from fpipe._plan._programs import Programs as Programs
from fpipe._plan._programs import Request as Request
from fpipe._plan._programs import direct_pairs as direct_pairs
from fpipe._plan._programs import split_pairs as split_pairs
