"""Moves between processes: how one is issued, and what all processes do before the
first. And programs that several processes run together.

In: the moves of a plan whose arrays come from another process, and the shapes of what
is in its slots. Out: for each a `Crossing`, which every process of the job calls, in
the order of the plan, whether or not it has a part in it:

    cpu:0 -> cpu:2048: y[0] stage0 mb0
    process 0    sends its array          gets a ghost
    process 1    gives a ghost            gets the array
    process 2    gives a ghost            gets a ghost

A `device_put` that one process leaves out gives another one the wrong data, silently
(see `fpipe._core.processes`). So before a plan runs for the first time, the processes
compare it, and an error says what differs.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from fpipe._core.processes import (
    Link,
    digest,
    ghost,
    goes_as_it_is,
    is_here,
    meet,
)
from fpipe._core.pytrees import copied
from fpipe._core.watchdog import expect, waiting
from fpipe._executors.placed.instructions import Move, Plan, Run
from fpipe._executors.programs import Layout
from fpipe._executors.transfers import Sending, send_across


@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """A move between processes, ready to be issued: from arrays to arrays.

    Attributes:
        sendings: how each array goes.
        given: for each part that is sent a ghost, where this process has none of it;
            else `None`.
        what: what is moved, as plans name it.
        owned: whether the arrays are the plan's alone. The parameters and what a call
            returns are not: the caller may donate them.
        direct: the sharding to which all of them go by one `device_put`, as they are;
            `None`: more has to be done.
    """

    sendings: tuple[Sending, ...]
    given: tuple[Any, ...]
    what: str
    owned: bool
    direct: Sharding | None

    @classmethod
    def of(
        cls, plan: Plan, move: Move, shapes: Mapping[int, jax.ShapeDtypeStruct]
    ) -> "Crossing":
        """A move of a plan.

        Arguments:
            shapes: those of what is sent, by slot.
        """
        sendings = move.sendings or tuple(
            Sending((), plan.sharding(here), plan.sharding(there), None)
            for here, there in zip(move.ins, move.outs, strict=True)
        )
        given = tuple(
            None
            if is_here(plan.sharding(slot))
            else ghost(shapes[slot].shape, shapes[slot].dtype, plan.sharding(slot))
            for slot in move.ins
        )
        names = ", ".join(plan.slots[slot].name for slot in move.outs)
        source = plan.slots[move.ins[0]].placement
        told = ", ".join(map(str, sorted(source.processes)))
        what = f"the transfer of {names} from {source} (process {told})"
        theirs = {feed.slot for feed in plan.feeds}.union(plan.returned)
        owned = theirs.isdisjoint(move.ins)
        targets = {to.target for to in sendings}
        plain = all(to.goes_at_once for to in sendings) and all(
            goes_as_it_is(shapes[slot]) for slot in move.ins
        )
        direct = targets.pop() if plain and len(targets) == 1 else None
        return cls(sendings, given, f"{what} to {move.placement}", owned, direct)

    def __call__(self, *arrays: Any) -> list[Any]:
        """Issue it."""
        # What is known from the plan is not asked of the arrays again: that would take
        # 25 µs, half as long as the `device_put` (measured on jax 0.10.2, CPU).
        if self.direct is not None:
            is_known = self.given[0] is None
            going = list(arrays if is_known else self.given)
            if is_known and not self.owned:
                going = copied(going)
            put = jax.device_put(going, self.direct)
            if self._arrives:
                expect(put[-1], self._describe)
            return put
        parts = [
            array if own is None else own
            for own, array in zip(self.given, arrays, strict=True)
        ]
        return send_across(self.sendings, parts, self._describe, self.owned)

    @functools.cached_property
    def _arrives(self) -> bool:
        """Whether this process gets something."""
        return is_here(self.sendings[-1].target)

    def _describe(self) -> str:
        return self.what


@dataclasses.dataclass(frozen=True, eq=False)
class Together:
    """A program whose devices are in several processes, ready to be called. The
    watchdog is told of it: this process waits in it until the others run it too.

    Attributes:
        call: the program.
        shown: the number of the result that the watchdog waits for, the smallest one,
            which it holds until then; `None`: there is none.
        what: what the program does, in words.
    """

    call: Callable[..., Sequence[Any]]
    shown: int | None
    what: str

    @classmethod
    def of(
        cls,
        call: Callable[..., Sequence[Any]],
        run: Run,
        what: str,
        shapes: Mapping[int, jax.ShapeDtypeStruct],
    ) -> "Together":
        """A run of a plan.

        Arguments:
            shapes: those of what is in the slots.
        """
        outs = [shapes[slot] for slot in run.outs]
        sizes = {n: out.size for n, out in enumerate(outs) if goes_as_it_is(out)}
        return cls(call, min(sizes, key=lambda n: sizes[n], default=None), what)

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        """Issue it."""
        # Between CPUs a small program runs, and waits, in the thread that calls it.
        with waiting(self._describe):
            made = self.call(*arrays)
        if self.shown is not None:
            expect(made[self.shown], self._describe)
        return made

    def _describe(self) -> str:
        return f"{self.what}, which other processes run too"


def links_of(plan: Plan) -> list[Link]:
    """The ways between processes that a plan's moves take, in order."""
    found: dict[Link, None] = {}
    for item in plan.instructions:
        if not isinstance(item, Move) or not item.crosses:
            continue
        for source in plan.slots[item.ins[0]].placement.devices:
            for target in item.placement.devices:
                if source.process_index != target.process_index:
                    found[Link(source, target)] = None
    return list(found)


def agree(
    plan: Plan, layout: Layout, shapes: Mapping[int, jax.ShapeDtypeStruct]
) -> None:
    """All processes have the same plan; they wait for each other.

    Arguments:
        shapes: of what is in the slots.

    Raises:
        ValueError: they have not, in each of them.
    """
    parts = {
        "the versions of jax and fpipe": [jax.__version__, _version()],
        "the stages": [
            f"{stage.index} {stage.described} {place}"
            for stage, place in zip(layout.stages, layout.placements, strict=True)
        ],
        "the schedule": [str(row) for row in plan.schedule.actions],
        "the shapes of arrays": [
            f"{slot} {shape.shape} {shape.dtype}"
            for slot, shape in sorted(shapes.items())
        ],
        "the instructions of the plan": [str(plan)],
        "what the layers compute": _computed(plan),
    }
    told = meet(
        [digest("\n".join(lines)) for lines in parts.values()],
        lambda: "all processes to make the same call",
    )
    differing = [
        name
        for name, numbers in zip(parts, told.T, strict=True)
        if len(set(numbers.tolist())) > 1
    ]
    if not differing:
        return
    others = [p for p, row in enumerate(told) if row.tolist() != told[0].tolist()]
    raise ValueError(
        f"the processes have made different calls: in {_listed(others)} "
        f"{', '.join(differing)} differ from process 0; all processes run the same "
        "script, with the same pipe, and make the same calls in the same order"
    )


def _listed(processes: Sequence[int]) -> str:
    names = ", ".join(map(str, processes))
    return f"process{'es' if len(processes) > 1 else ''} {names}"


def _version() -> str:
    try:
        return importlib.metadata.version("fpipe")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return ""


def _computed(plan: Plan) -> list[str]:
    """The operations of the programs, by name: all that is told in every process
    alike.
    """
    lines: dict[int, str] = {}
    for item in plan.instructions:
        if not isinstance(item, Run):
            continue
        for part in item.parts:
            if id(part.code) not in lines:
                names = [node.name for node in part.code.graph.nodes]
                lines[id(part.code)] = f"{item.name} {' '.join(names)}"
    return list(lines.values())
