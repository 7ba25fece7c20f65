"""`Executor`: the one interface between a pipe and what runs it.

`Pipe`, planning, recording and tuning know an executor by these methods alone, so that
another executor is another class with them and nothing else. A step and its plan:

    executor.place(params, donate=False)       parameters where they belong
    executor.loss(args, loss, argnums=(0,))    loss, states and gradients
    executor.plan_data(args, loss, …)          what `pipe.plan` is told of the step

`Placed` dispatches one program per stage and kind of action; `Scan` runs the whole call
as one program; `fpipe.sequential` is the reference. It is no executor: it has no
devices and no schedule, and shares only the calls (`call.Call`) with a `Pipe`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from fpipe._core.pytrees import PyTree
from fpipe._executors.call import Args, Result
from fpipe._executors.plan_data import PlanData
from fpipe._executors.progress import Progress
from fpipe._executors.request import CallKind
from fpipe._executors.scheduling import Scheduling
from fpipe._model.loss import Loss
from fpipe._model.stages import Leaf, Stage
from fpipe.schedules import Schedule

# The backward half of a call, as a function of the residuals of the first half and of
# the cotangents of the arrays of `y`. For each array that can be differentiated it
# returns the gradient, or `None` for zero.
SecondHalf: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class FirstHalf:
    """What the forwards of a differentiated call give.

    Attributes:
        y, state: what the call returns.
        residuals: the arrays that the backwards start from. A pull-back may be called
            twice, so it must not consume them.
        second: the backward half.
    """

    y: PyTree
    state: tuple[PyTree, ...]
    residuals: Sequence[Any]
    second: SecondHalf


class Executor(Protocol):
    """What runs the calls of one pipe.

    Attributes:
        stages: the stages of the pipe, in order.
        scheduling: what schedule was asked for.
        stage_to_device: for each stage the number of its device.
        chunks: the number of microbatches asked for.
        owner: what tells the calls of this pipe from others in a recording.
        is_over_processes: whether a stage has devices of another process.
    """

    stages: tuple[Stage, ...]
    scheduling: Scheduling
    stage_to_device: tuple[int, ...]
    chunks: int
    owner: Any

    @property
    def is_over_processes(self) -> bool: ...

    def schedule(
        self, microbatches: int, kind: CallKind = CallKind.GRADIENT
    ) -> Schedule:
        """The schedule of such a call with that many microbatches, checked against the
        model.
        """
        ...

    def context(self) -> AbstractContextManager[Any]:
        """The context of JAX in which it traces and runs, whatever is the caller's."""
        ...

    def tracing(self) -> AbstractContextManager[Any]:
        """The context of JAX in which layers are traced: it has the axes of a stage."""
        ...

    # --- parameters ---

    def make_params(
        self, layer: int, make: Callable[[Any], PyTree], key: Any
    ) -> PyTree:
        """Run `make(key)` where a layer's parameters live; elsewhere only shapes."""
        ...

    def make_state(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` where a layer's state lives."""
        ...

    def place(self, params: Sequence[PyTree], donate: bool) -> Any:
        """Parameters, one entry per layer, where they live, and as they are kept.

        Arguments:
            donate: whether they may be the given arrays; else they have memory of their
                own.
        """
        ...

    def gather(self, params: Any) -> tuple[PyTree, ...]:
        """The exact inverse of `place`, on one device, in memory of its own."""
        ...

    def check_params(self, params: Any, call: str) -> None:
        """Refuse parameters that are not placed for this pipe; `call` is for the
        message.
        """
        ...

    def param_shapes(self, params: Any) -> tuple[PyTree, ...]:
        """The shapes of placed parameters, one entry per layer."""
        ...

    def param_leaves(self, params: Any) -> list[tuple[Leaf, ...]]:
        """For each array of placed parameters, in order, the leaves that it holds."""
        ...

    # --- calls ---

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`, of a call that nothing differentiates."""
        ...

    def differentiable(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)` of a call with traced arguments, which `jax.grad` and `jax.vjp`
        can differentiate.
        """
        ...

    def first_half(
        self, args: Args, leaves: Sequence[tuple[Leaf, ...]], asked: Sequence[bool]
    ) -> FirstHalf:
        """The forwards of a call that is differentiated from outside.

        Arguments:
            leaves: for each array of parameters and differentiable inputs what it
                holds.
            asked: whether its gradient is asked for.
        """
        ...

    def bring(self, arrays: Sequence[Any]) -> list[Any]:
        """Inputs where a differentiated call takes them, before it is one."""
        ...

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        ...

    def compile(
        self,
        args: Args,
        loss: Loss | None,
        argnums: tuple[int, ...],
        threads: int | None,
        progress: Progress | None,
    ) -> int:
        """Compile the programs of a call; shapes will do. Returns how many there
        are.
        """
        ...

    # --- without jit ---

    def collect(self, tree: PyTree) -> PyTree:
        """The caller's arrays where `gather` puts parameters."""
        ...

    def gather_state(self, state: PyTree) -> PyTree:
        """The states of all layers where `gather` puts parameters, in memory of their
        own.
        """
        ...

    def deliver(self, tree: PyTree) -> PyTree:
        """The result of the last layer, on the device where a call leaves it."""
        ...

    def tell(self, tree: PyTree) -> PyTree:
        """A loss and its aux, on the device where a call leaves them."""
        ...

    def deliver_state(self, state: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The states of all layers, on the devices where a call leaves them."""
        ...

    def spread(self, gradients: Sequence[PyTree], params: Any) -> Any:
        """Gradients of gathered parameters as those of placed ones.

        Arguments:
            params: the placed parameters.
        """
        ...

    # --- planning ---

    def plan_data(
        self, args: Args, loss: Loss, argnums: tuple[int, ...], compiled: bool
    ) -> PlanData:
        """What is known of a call with a loss, for a prediction.

        Arguments:
            args: the call's, arrays or their shapes; parameters have one entry per
                layer, whatever `place` makes of them.
            compiled: whether to compile, for the memory that programs need.
        """
        ...
