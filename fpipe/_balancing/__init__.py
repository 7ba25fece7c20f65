"""The balance of a pipe: which layers go into which stage (`balance`), for what every span of layers costs as a stage."""

from fpipe._balancing._front import balance as balance
from fpipe._balancing._front import balanced as balanced
from fpipe._balancing._given import given_balance as given_balance
