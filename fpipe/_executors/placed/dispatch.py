"""A plan ready to run: its instructions dispatched asynchronously, by one thread or by
one for each device.
"""

import contextlib
import contextvars
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax

from fpipe._core.errors import add_note
from fpipe._core.pytrees import is_inexact
from fpipe._executors.placed.compile import Progress, compile_plan
from fpipe._executors.placed.instructions import (
    Free,
    Instruction,
    Move,
    Plan,
    Run,
    used_later,
)
from fpipe._executors.placed.threads import Crew, Part, divide
from fpipe._executors.placed.watch import Half, Ran, Watch, Way, ways_of
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Inputs, Layout
from fpipe._executors.recording import recorders_of
from fpipe._model.stages import Leaf, Port

# Who dispatches. One thread is enough where a dispatch returns at once. A thread for
# each device costs more on the host, and is needed where a dispatch may wait for the
# program: then the other devices would stand idle meanwhile.
Dispatch: TypeAlias = Literal["auto", "one_thread", "thread_per_device"]
DISPATCH: tuple[Dispatch, ...] = get_args(Dispatch)

# Read slots, call, write slots, drop slots.
Step: TypeAlias = tuple[
    Callable[[list[Any]], Sequence[Any]],
    Callable[..., Sequence[Any]],
    tuple[int, ...],
    tuple[int, ...],
]

# What is called in place of an instruction's call.
Through: TypeAlias = Callable[
    [int, Callable[..., Sequence[Any]]], Callable[..., Sequence[Any]]
]

Observer: TypeAlias = Callable[[Instruction, Sequence[Any]], None]
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "observer", default=None
)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Call `observer(instruction, slots)` after each instruction that is issued
    meanwhile; one call at a time.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A plan ready to run: its instructions as steps, with the frees that follow folded
    in.

    Attributes:
        steps, at: what one thread does, and the instruction of each step.
        half: the first step of the backward half.
        threaded: whether each device has a dispatching thread.
        params: how many parameters there are; they fill the first slots.
        feeds: what else is put where, in one transfer for each placement.
        given: the shapes of all inputs, by slot.
        later: the slots that the backward half reads and does not make.
        blank: the slots before a call.
    """

    plan: Plan
    layout: Layout
    steps: tuple[Step, ...]
    at: tuple[int, ...]
    half: int
    threaded: bool
    params: tuple[Placement, ...]
    feeds: tuple[tuple[Placement, tuple[Leaf, ...], tuple[int, ...]], ...]
    given: Mapping[int, jax.ShapeDtypeStruct]
    later: tuple[int, ...]
    blank: tuple[Any, ...]

    def slots(
        self, params: Sequence[Any], others: Mapping[Port, Sequence[Any]]
    ) -> list[Any]:
        """Fresh slots with the inputs in them, each put where it is read."""
        slots = list(self.blank)
        slots[: len(params)] = params
        for placement, leaves, numbers in self.feeds:
            for n, array in zip(
                numbers,
                placement.put([others[port][k] for port, k in leaves]),
                strict=True,
            ):
                slots[n] = array
        return slots

    def compile(
        self, threads: int | None = None, progress: Progress | None = None
    ) -> int:
        """Compile everything that the plan runs; returns how many programs that is."""
        return len(
            set(
                map(id, compile_plan(self.plan, self.given, threads, progress).values())
            )
        )

    def run(self, slots: list[Any], half: Half = "whole") -> list[Any]:
        """Issue the steps in order; returns the slots."""
        through = self._annotated if _profiled() else None
        recorders = recorders_of(self.layout)
        if not recorders:
            return self._run(slots, half, through)
        ways = self._ways  # compiles
        jax.block_until_ready([a for a in slots if a is not None])
        with Watch(self.plan, ways) as watch:
            slots = self._run(slots, half, _chained(through, watch.through))
        if watch.failures:
            n, error = min(watch.failures, key=lambda failure: failure[0])
            add_note(
                error, f"while running {self._described(self.plan.instructions[n])}"
            )
            try:
                raise error
            finally:
                del watch, error  # no circle through the traceback
        ran = Ran(self.plan, half, watch.issued, watch.ended, watch.moved)
        for recorder in recorders:
            last = recorder.calls[-1] if recorder.calls else None
            if (
                half == "backward"
                and isinstance(last, Ran)
                and last.half == "forward"
                and last.plan is self.plan
            ):
                recorder.calls[-1] = last.joined(ran)
            else:
                recorder.calls.append(ran)
        return slots

    def _run(self, slots: list[Any], half: Half, through: Through | None) -> list[Any]:
        if self.threaded:
            return self._run_in_threads(slots, half, through)
        observer, n = _observer.get(), 0
        start, stop = {
            "whole": (0, None),
            "forward": (0, self.half),
            "backward": (self.half, None),
        }[half]
        steps = self.steps[start:stop]
        if through is not None:
            steps = [
                (get, through(self.at[n], call), outs, frees)
                for n, (get, call, outs, frees) in enumerate(steps, start)
            ]
        try:
            for n, (get, call, outs, frees) in enumerate(steps, start):
                for out, array in zip(outs, call(*get(slots))):  # noqa: B905 - strict costs time here
                    slots[out] = array
                for dead in frees:
                    slots[dead] = None
                if observer is not None:
                    observer(self.plan.instructions[self.at[n]], slots)
        except Exception as error:
            self._note(error, self.at[n])
            raise
        return slots

    def _run_in_threads(
        self, slots: list[Any], half: Half, through: Through | None
    ) -> list[Any]:
        parts, observer = self._parts[half], _observer.get()
        if through is not None:
            parts = [
                part._replace(
                    steps=tuple(
                        step._replace(call=through(step.at, step.call))
                        for step in part.steps
                    )
                )
                for part in parts
            ]
        observe = observer and (lambda n, own: observer(self.plan.instructions[n], own))
        failure = Crew(parts, observe).run(slots)
        if failure is not None:
            n, error = failure
            self._note(error, n)
            try:
                raise error
            finally:
                del (
                    failure,
                    error,
                )  # no circle through the traceback: what the run held is dropped now
        return slots

    @functools.cached_property
    def _compiled(self) -> Mapping[int, Any]:
        return compile_plan(self.plan, self.given)

    @functools.cached_property
    def _ways(self) -> Mapping[int, Way]:
        return ways_of(self.plan, lambda n: self._compiled[n].out_info)

    def _annotated(
        self, n: int, call: Callable[..., Sequence[Any]]
    ) -> Callable[..., Sequence[Any]]:
        """The call of an instruction with a name in profiles, `stage2 F mb3`."""
        item = self.plan.instructions[n]
        assert not isinstance(item, Free)
        name = f"transfer to {item.placement.device}"
        if isinstance(item, Run):
            name = (
                f"{item.name} on {item.placement.device}"
                if item.action is None
                else item.action.name
            )

        def annotated(*arrays: Any) -> Sequence[Any]:
            with jax.profiler.TraceAnnotation(name):
                return call(*arrays)

        return annotated

    @functools.cached_property
    def _parts(self) -> Mapping[Half, list[Part]]:
        # Compiled here: settings such as `jax.enable_x64` are the calling thread's, and
        # tracing depends on them.
        compiled, plan = self._compiled, self.plan
        end = len(plan.instructions)
        ranges: dict[Half, tuple[int, int]] = {
            "whole": (0, end),
            "forward": (0, plan.backward),
            "backward": (plan.backward, end),
        }

        def step(n: int, item: Instruction) -> Any:
            assert not isinstance(item, Free)
            return _getter(item.ins), _mover(item) if isinstance(
                item, Move
            ) else compiled[n]

        whole: tuple[Half, ...] = (
            ("whole",) if plan.backward == end else ("forward", "backward")
        )
        return {half: divide(plan, *ranges[half], step) for half in whole}

    def _note(self, error: Any, n: int) -> None:
        add_note(
            error, f"while dispatching {self._described(self.plan.instructions[n])}"
        )

    def _described(self, item: Instruction) -> str:
        if not isinstance(item, Run):
            return "a transfer"
        if item.action is None:
            return f"{item.name!r} on {item.placement.device}"
        kind, s, i = item.action
        doing = {
            "F": "forward",
            "B": "backward",
            "I": "input gradient",
            "W": "weight gradient",
        }[kind]
        layers = self.layout.stages[s].described
        return f"the {doing} of stage {s} ({layers}), microbatch {i}, on {item.placement.device}"


def _profiled() -> bool:
    """Whether a profile is being taken. Where a release of JAX cannot tell, names are
    always given: they cost little.
    """
    return getattr(jax.profiler.TraceAnnotation, "is_enabled", lambda: True)()


def _chained(outer: Through | None, inner: Through) -> Through:
    return inner if outer is None else lambda n, call: outer(n, inner(n, call))


def bind(
    plan: Plan,
    layout: Layout,
    inputs: Inputs,
    dispatch: Dispatch,
    constant: Callable[[Any, Placement], Any],
) -> Bound:
    """Turn a plan into steps; `constant(value, placement)` is a value that stays where
    it is read.
    """
    constants = {
        n: constant(value, plan.slots[n].placement)
        for n, value in plan.constants.items()
    }
    steps: list[Step] = []
    at: list[int] = []
    half = None
    for n, item in enumerate(plan.instructions):
        if n == plan.backward:
            half = len(steps)
        if isinstance(item, Free):
            get, call, outs, frees = steps[-1]
            steps[-1] = (get, call, outs, (*frees, *item.slots))
        else:
            steps.append(
                (
                    _getter(item.ins),
                    item.call if isinstance(item, Run) else _mover(item),
                    item.outs,
                    (),
                )
            )
            at.append(n)
    params = [feed for feed in plan.feeds if feed.leaf.port.kind == "params"]
    assert [feed.slot for feed in params] == list(range(len(params))), (
        "parameters fill the first slots, in order"
    )
    feeds: dict[Placement, list[tuple[Leaf, int]]] = {}
    for leaf, slot in plan.feeds[len(params) :]:
        feeds.setdefault(plan.slots[slot].placement, []).append((leaf, slot))
    given = {slot: inputs.of(leaf.port).leaves[leaf.k] for leaf, slot in plan.feeds}
    given |= {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in constants.items()}
    carrying = (
        [a for a in plan.y.shape.leaves if is_inexact(a)]
        if plan.y and plan.cotangents
        else []
    )
    given |= dict(zip(plan.cotangents, carrying, strict=True))
    return Bound(
        plan,
        layout,
        tuple(steps),
        tuple(at),
        len(steps) if half is None else half,
        _threaded(plan, dispatch),
        tuple(plan.slots[feed.slot].placement for feed in params),
        tuple(
            (place, tuple(leaf for leaf, _ in e), tuple(n for _, n in e))
            for place, e in feeds.items()
        ),
        given,
        tuple(
            sorted(
                used_later(plan.instructions[plan.backward :])
                - set(plan.constants)
                - set(plan.cotangents)
            )
        ),
        tuple(constants.get(n) for n in range(len(plan.slots))),
    )


def _threaded(plan: Plan, dispatch: Dispatch) -> bool:
    runs = [item for item in plan.instructions if isinstance(item, Run)]
    if dispatch == "auto" and not any(run.calls_host for run in runs):
        return False
    return dispatch != "one_thread" and len({run.placement for run in runs}) > 1


def _getter(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(slots) == 0:
        return lambda _: ()
    if len(slots) == 1:
        (n,) = slots
        return lambda values: (values[n],)
    return operator.itemgetter(*slots)


def _mover(item: Move) -> Callable[..., Sequence[Any]]:
    put = item.placement.put
    return lambda *arrays: put(arrays)
