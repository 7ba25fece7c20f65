"""What a training step of each of several pipes takes, measured on their devices.

In: pipes, each with its step; parameters, states and inputs may be shapes. Out: for
each pipe a `StepTime`, or why it failed:

    1f1b      StepTime(seconds=1.9e-3, launch=0.4e-3)
    zb_h1     Failed("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory …")

The pipes take turns, so that a machine that becomes slower does so for all of them:

    turn 0    1f1b  zb_h1  gpipe      each compiles, then a few steps
    turn 1    1f1b  zb_h1  gpipe      a few steps

Parameters are placed for a turn and go when it ends: at no time are those of two pipes
on the devices.

Over several processes all make the same steps in the same order. The times are those
of process 0. A pipe whose parameters have no room in one process has failed in all; an
error in a step is raised.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from fpipe._core.processes import gather_floats, is_ghost
from fpipe._core.pytrees import (
    PyTree,
    map_arrays,
    numbers_as_arrays,
    pack,
    shapes_of,
    strong,
    zeros,
    zeros_like,
)
from fpipe._core.settings import explicit_transfers, unchecked
from fpipe._executors.call import Args
from fpipe._executors.placed.pace import LOOKED_AT
from fpipe._executors.scan.packing import Packed
from fpipe._pipe import Pipe
from fpipe._planning.step_request import StepRequest
from fpipe._planning.work import Measured, least, of_first_process, runs

StepTime: TypeAlias = Measured

_Result = TypeVar("_Result")

# How often each pipe has its turn, and how many of its steps count in each.
_TURNS = 3
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Failed:
    """A pipe whose step raised an error.

    Attributes:
        error: its type and the first line of its message.
    """

    error: str


def measured_steps(
    steps: Sequence[tuple[Pipe, StepRequest]], params: Any
) -> list[StepTime | Failed]:
    """The shortest of some steps of each pipe, and the shortest launch.

    Arguments:
        steps: pipes over the same layers, each with its training step.
        params: what the user gave: one entry per layer, or packed. Zeros stand for
            shapes, and for what this process does not have.
    """
    given = _by_layer(params)
    if any(pipe._executor.is_over_processes for pipe, _ in steps):
        # A parameter that some processes make is made by all of them.
        here = given is not None and _is_here(given)
        if not _gathered([float(here)]).all():
            given = None
    measured: list[list[StepTime]] = [[] for _ in steps]
    failed: dict[int, Failed] = {}
    ready: dict[int, _Step] = {}
    for turn in range(_TURNS):
        for n, (pipe, request) in enumerate(steps):
            if n in failed:
                continue
            with _context(pipe):
                if n not in ready:
                    made = _attempt(pipe, lambda p=pipe, r=request: _Step.of(p, r))
                    if isinstance(made, Failed):
                        failed[n] = made
                        continue
                    ready[n] = made
                found = ready[n].turn(given, is_first=turn == 0)
            if isinstance(found, Failed):
                failed[n] = found
            else:
                measured[n].append(found)
    return [
        failed[n] if n in failed else least(times) for n, times in enumerate(measured)
    ]


@dataclasses.dataclass(frozen=True)
class _Step:
    """The training step of a pipe.

    Attributes:
        args: with inputs that are arrays; parameters and states may be shapes.
        numbers: of the arguments that are differentiated.
    """

    pipe: Pipe
    request: StepRequest
    args: Args
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, pipe: Pipe, request: StepRequest) -> "_Step":
        """The step with all shapes known."""
        # That of the call, so that a later one finds its programs.
        loss = dataclasses.replace(request.loss, call="value_and_grad")
        request = dataclasses.replace(request, loss=loss)
        with pipe._executor.tracing():
            args, numbers = request.resolved(pipe.model, pipe.chunks)
            args, numbers = pipe._trees.asked(args, numbers)
        inputs = _without_shapes((args.x, args.targets, dict(args.needs)))
        x, targets, needs = inputs
        args = args._replace(x=x, targets=targets, needs=needs)
        return cls(pipe, request, args, numbers)

    def turn(self, given: Sequence[PyTree] | None, is_first: bool) -> StepTime | Failed:
        """Some steps, with parameters that are there as long as the turn."""
        warm_up = 1
        # The first call compiles. The next ones may find out how it is dispatched.
        if is_first and self.pipe.executor == "placed" and self.pipe.dispatch == "auto":
            warm_up = 2 * (1 + LOOKED_AT)
        arguments = _attempt(self.pipe, lambda: self._arguments(given))
        if isinstance(arguments, Failed):
            return arguments
        if not self.pipe._executor.is_over_processes:
            return _attempt(
                self.pipe, lambda: least(runs(self, lambda: arguments, warm_up, _STEPS))
            )
        # While they wait for each other no process can tell the others of an error. So
        # it is raised, as by a call.
        found = least(runs(self, lambda: arguments, warm_up, _STEPS))
        return StepTime(*of_first_process(found))

    def _arguments(self, given: Sequence[PyTree] | None) -> tuple[Any, PyTree]:
        """Parameters and state, where they live."""
        with explicit_transfers():
            return self._placed(given), self._state()

    def __call__(self, params: Any, state: PyTree) -> list[Any]:
        """A step. It returns the arrays that this process can wait for."""
        args = self.args._replace(params=params, state=state)
        result = self.pipe._runner.loss(args, self.request.loss, self.numbers)
        return [a for a in jax.tree.leaves(result) if not is_ghost(a)]

    def _placed(self, given: Sequence[PyTree] | None) -> Any:
        """The parameters where the pipe has them."""
        executor, made = self.pipe._executor, []
        with executor.tracing():
            for k, shapes in enumerate(self.args.params):
                own = None if given is None else given[k]
                if own is not None and _is_here(own):
                    made.append(map_arrays(strong, numbers_as_arrays(own)))
                    continue

                def make(key: Any, shapes: PyTree = shapes) -> PyTree:
                    del key
                    return zeros_like(shapes)

                made.append(executor.make_params(k, make, jax.random.key(0)))
        # A step consumes no parameters, so what lies there already need not be copied.
        return executor.place(tuple(made), donate=True)

    def _state(self) -> PyTree:
        """The state, where the pipe has it if it is made here."""
        if self.args.state is None:
            return None
        executor, made = self.pipe._executor, []
        with executor.tracing():
            for k, own in enumerate(self.args.state):
                if _is_here(own):
                    made.append(own)
                    continue

                def make(key: Any, shapes: PyTree = own) -> PyTree:
                    del key
                    return zeros_like(shapes_of(shapes))

                made.append(executor.make_state(k, make, jax.random.key(0)))
        return tuple(made)


@contextlib.contextmanager
def _context(pipe: Pipe) -> Iterator[None]:
    """What a step runs in: the pipe's own context. The caller's settings are for
    programs of the caller, and not for steps on zeros.
    """
    with (
        pipe._context(),
        jax.disable_jit(False),
        unchecked(),
    ):
        yield


def _by_layer(params: Any) -> Sequence[PyTree] | None:
    """What the user gave, one entry per layer; packed parameters in the memory of the
    host, which has room for them.
    """
    if not isinstance(params, Packed):
        return params
    packing = params.packing
    if not all(map(_is_here, params.arrays)):
        return None
    rows = [np.asarray(row) for row in params.arrays]
    return packing.trees([packing.take(rows, entry) for entry in packing.entries])


def _is_here(tree: PyTree) -> bool:
    """Whether all arrays of a tree are arrays, and whole in this process."""
    return all(
        not isinstance(a, jax.ShapeDtypeStruct)
        and getattr(a, "is_fully_addressable", True)
        for a in pack(tree)[0]
    )


def _without_shapes(tree: Any) -> Any:
    """Zeros in place of shapes."""
    return jax.tree.map(
        lambda a: zeros(a) if isinstance(a, jax.ShapeDtypeStruct) else a, tree
    )


def _attempt(pipe: Pipe, f: Callable[[], _Result]) -> _Result | Failed:
    """What a function returns, or its error, of this process or of another one."""
    made: _Result | Failed
    # Whatever a layer raises: the other pipes may run all the same. The error itself is
    # not kept, because its frames would keep arrays.
    try:
        made = f()
    except Exception as error:
        made = Failed(_first_line(error))
    if pipe._executor.is_over_processes:
        others = np.flatnonzero(_gathered([float(isinstance(made, Failed))]))
        if others.size and not isinstance(made, Failed):
            return Failed(f"an error in process {others[0]}")
    return made


def _gathered(numbers: Sequence[float]) -> np.ndarray:
    """The numbers of all processes, one row for each."""
    return gather_floats(np.array(numbers), lambda: "all processes to measure steps")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
