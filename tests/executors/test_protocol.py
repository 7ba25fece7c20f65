"""The one interface of executors: the same methods, with the same signatures."""

import inspect

import pytest

from fpipe._executors.call import Args
from fpipe._executors.placed.executor import Placed
from fpipe._executors.protocol import Executor
from fpipe._executors.scan.executor import Scan
from fpipe._executors.sequential import PlainExecutor
from fpipe._model.needs import INPUTS

METHODS = [
    name
    for name, value in vars(Executor).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
# What makes no sense without devices.
DEVICES_ONLY = {
    "schedule",
    "context",
    "tracing",
    "param_shapes",
    "param_leaves",
    "bring",
    "differentiable",
    "first_half",
    "compile",
    "plan_data",
    "collect",
    "gather_state",
    "deliver",
    "tell",
    "deliver_state",
    "spread",
}


def parameters(method):
    """The names and defaults of a method's parameters."""
    named = inspect.signature(method).parameters.values()
    return [(p.name, p.kind, p.default) for p in named]


def public(executor):
    return {name for name in dir(executor) if not name.startswith("_")}


@pytest.mark.quick
@pytest.mark.parametrize("executor", [Placed, Scan])
@pytest.mark.parametrize("name", METHODS)
def test_an_executor_has_every_method_as_it_is_declared(executor, name):
    assert parameters(getattr(executor, name)) == parameters(getattr(Executor, name))


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_has_those_that_need_no_devices(name):
    if name in DEVICES_ONLY:
        assert name not in public(PlainExecutor)
    else:
        got = parameters(getattr(PlainExecutor, name))
        assert got == parameters(getattr(Executor, name))


def test_the_interface_is_what_planning_and_the_pipe_use():
    assert len(METHODS) == 23
    assert set(METHODS) > DEVICES_ONLY


def test_the_inputs_of_a_call_are_those_of_the_table_of_needs_in_its_order():
    assert list(Args((), None).inputs) == list(INPUTS)
