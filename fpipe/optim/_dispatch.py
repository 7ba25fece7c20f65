"""A function of arrays on several devices, compiled and dispatched program by program.

In: a function of flat arrays and the devices of its arrays. Out: a `PlacedFunction`. It
is traced and divided once, for arrays of one form, and then called with any of these:
programs are dispatched in the order of the plan, arrays are moved just before the
program that reads them, and nothing waits for a result. A call that clips three
gradients by their global norm (the plan in `_programs.py`) dispatches

    program of device 1: its sum     program of device 2: its sum
    move both sums to device 0       program of device 0: the norm
    move the norm to 1 and 2         programs of devices 0, 1, 2: the updates
"""

import enum
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from fpipe._core.processes import Link, alive, connect, ghost
from fpipe._core.pytrees import strong
from fpipe._core.settings import donated
from fpipe._executors.transfers import bring, bring_across
from fpipe.optim._leaf_devices import Home, device_of, is_home_here, whole_at
from fpipe.optim._partition import partition
from fpipe.optim._programs import Part, ProgramPlan, Slot, plan_programs
from fpipe.optim._update_graph import UpdateGraph, run_operations

# Arrays by slot and device; `None`: where the array was made, or came in. The norm in
# slot 5, made on device 0 and moved to device 1, is at `(5, None)` and at `(5, 1)`.
_Arrays: TypeAlias = dict[tuple[int, int | None], Any]


class Tree(enum.Enum):
    """A tree that goes in and comes out again, changed.

    If an output is an unchanged input, it is the same array, provided that both are of
    one tree which is donated. Otherwise it is copied, so that a later donation of the
    output does not delete the input.
    """

    # Parameters are of no tree: the caller may overwrite an update, and the parameters
    # must keep their own arrays.
    GRADIENTS = enum.auto()  # They come out as updates.
    STATE = enum.auto()


class Input(NamedTuple):
    """What is known of an input.

    Attributes:
        owner: the device that it belongs to; `None` for a number that all share,
            wherever it is.
        donate: whether it may be overwritten.
        tree: the tree that it is of.
        is_given: whether the caller gave it in this call, and each of several processes
            has one of its own.
    """

    owner: Home | None
    donate: bool = False
    tree: Tree | None = None
    is_given: bool = False


class Output(NamedTuple):
    """What is asked of an output.

    Attributes:
        device: that it is wanted on, or a mesh.
        tree: the tree that it is of.
        lies: how it is to lie on a mesh; `None`: as it comes.
    """

    device: Home
    tree: Tree | None = None
    lies: Sharding | None = None


class PlacedFunction:
    """A divided function, ready to call; each program is compiled on its first call.

    Attributes:
        cut: the programs and what moves between devices, as data.
        calls: one jitted function for each program.
    """

    def __init__(
        self, cut: ProgramPlan, devices: Sequence[Home], outputs: Sequence[Output]
    ) -> None:
        # A constant that is a JAX array would pull a program to the device that it is
        # on. PRNG keys stay as they are: numpy has no dtype for them.
        constants = {
            v: np.asarray(a)
            for v, a in cut.graph.constants.items()
            if isinstance(a, jax.Array) and isinstance(a.dtype, np.dtype)
        }
        self.cut = cut
        self.calls = [
            _jit_part(cut, part, devices[part.device], constants, outputs)
            for part in cut.parts
        ]
        self._devices = tuple(devices)
        # What each program would give, where another process runs it.
        self._ghosts = [
            None
            if is_home_here(devices[part.device])
            else _ghosts(cut, part, devices[part.device], outputs)
            for part in cut.parts
        ]
        self._donated = sorted({slot for part in cut.parts for slot in part.donates})
        # What moves before each program, and after the last. A `device_put` of several
        # arrays costs the host little more than one of a single array, so that there is
        # one for each device.
        self._moves: list[dict[Way, list[int]]] = [
            {} for _ in range(len(self.calls) + 1)
        ]
        for move in cut.moves:
            way = Way(None, move.target)
            if move.source is not None and _crosses(
                devices[move.source], devices[move.target]
            ):
                way = Way(move.source, move.target)
            self._moves[move.before].setdefault(way, []).append(move.slot)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run it on arrays of the form that it was traced for; nothing waits."""
        # Inputs have the first slots, in order (`ProgramPlan.slots`).
        arrays: _Arrays = {(slot, None): array for slot, array in enumerate(inputs)}
        if self._donated:
            self._copy_repeated(inputs, arrays)
        if any(own is not None for own in self._ghosts):
            connect(self._links)
        # `_moves` has one more entry than there are programs: that of the outputs.
        for moves, part, call, ghosts in zip(
            self._moves, self.cut.parts, self.calls, self._ghosts, strict=False
        ):
            self._move(moves, arrays)
            if ghosts is None:
                taken = (_find(arrays, slot, part.device) for slot in part.takes)
                results = call(*taken)
            else:
                results = list(map(alive, ghosts))
            arrays.update(
                zip([(slot, None) for slot in part.gives], results, strict=True)
            )
        self._move(self._moves[-1], arrays)
        return [_find(arrays, slot, device) for slot, device in self.cut.outputs]

    def _copy_repeated(self, inputs: Sequence[Any], arrays: _Arrays) -> None:
        """Copy what is donated and was given twice: a buffer can be donated once, and
        not while it is read elsewhere.
        """
        count = Counter(map(id, inputs))
        for slot in self._donated:
            if count[id(inputs[slot])] > 1:
                arrays[slot, None] = jnp.copy(inputs[slot])

    @functools.cached_property
    def _links(self) -> list[Link]:
        """The ways between processes that arrays take."""
        return [
            Link(source, target)
            for moves in self._moves
            for way in moves
            if way.source is not None
            for source in _devices_of(self._devices[way.source])
            for target in _devices_of(self._devices[way.target])
            if source.process_index != target.process_index
        ]

    def _move(self, moves: "dict[Way, list[int]]", arrays: _Arrays) -> None:
        for (source, device), slots in moves.items():
            home = self._devices[device]
            given = [arrays[slot, None] for slot in slots]
            if source is not None:
                put = bring_across(
                    given,
                    [whole_at(home)] * len(given),
                    lambda source=source, home=home: (
                        f"an update's numbers from {self._devices[source]} to {home}"
                    ),
                )
            elif not is_home_here(home):
                continue
            elif isinstance(home, Mesh):
                put = bring(given, [NamedSharding(home, PartitionSpec())] * len(given))
            elif any(len(a.devices()) > 1 for a in given if isinstance(a, jax.Array)):
                put = bring(given, [SingleDeviceSharding(home)] * len(given))
            else:
                put = jax.device_put(given, home)
            arrays.update(zip([(slot, device) for slot in slots], put, strict=True))


class Way(NamedTuple):
    """Where arrays move to, and where they come from, if that is another process."""

    source: int | None
    target: int


def _devices_of(home: Home) -> list[Any]:
    return list(home.devices.flat) if isinstance(home, Mesh) else [home]


def _crosses(source: Home, target: Home) -> bool:
    """Whether an array leaves its process on the way."""
    devices = (*_devices_of(source), *_devices_of(target))
    return len({device.process_index for device in devices}) > 1


def _ghosts(
    cut: ProgramPlan, part: Part, home: Home, outputs: Sequence[Output]
) -> list[Any]:
    """What the program of a part gives, as other processes know it."""
    found = []
    for number in part.gives:
        slot = cut.slots[number]
        avals = [cut.graph.avals[v] for v in slot.values]
        shape = avals[0].shape
        if slot.bundled:
            shape = (sum(math.prod(a.shape) for a in avals),)
        output = None if slot.output is None else outputs[slot.output]
        lies = None if output is None else output.lies
        found.append(ghost(shape, avals[0].dtype, lies or whole_at(home)))
    return found


def _find(arrays: _Arrays, slot: int, device: int) -> Any:
    # A copy that was moved here, if there is one; without a move it was here already.
    key = (slot, device)
    return arrays[key] if key in arrays else arrays[slot, None]


def divide(
    graph: UpdateGraph,
    arrays: Sequence[Any],
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    first: Home,
) -> PlacedFunction:
    """Divide a traced function over the devices of its arrays.

    Arguments:
        graph: traced of arrays such as `arrays`.
        first: the device on which small values of several devices meet.
    """
    # The owner of an input is the device that works on it, and `found_on` is where the
    # array is now. They differ for a count of steps: all devices own it (`None`), and
    # it is found on the first one, from where it is copied.
    found_on = [
        None if i.is_given else device_of(a)
        for i, a in zip(inputs, arrays, strict=True)
    ]
    devices = [first, *(output.device for output in outputs)]
    devices += [d for d in (*(i.owner for i in inputs), *found_on) if d is not None]
    devices = list(dict.fromkeys(devices))
    # The plan knows devices by number; no device stays none.
    number: dict[Home | None, int | None] = {None: None}
    number.update((device, n) for n, device in enumerate(devices))
    wanted_on = [devices.index(output.device) for output in outputs]
    divided = partition(
        graph,
        [number[i.owner] for i in inputs],
        [[device] for device in wanted_on],
        meeting_device=0,
    )
    # `optax.masked` returns the gradients that it leaves alone as they came. Such an
    # output needs no program.
    tree_of = {v: i.tree for v, i in zip(graph.inputs, inputs, strict=True) if i.donate}
    aliasing = [
        output.tree is not None and tree_of.get(value) is output.tree
        for value, output in zip(graph.outputs, outputs, strict=True)
    ]
    cut = plan_programs(
        divided,
        [number[device] for device in found_on],
        wanted_on,
        aliasing,
        [i.donate for i in inputs],
    )
    return PlacedFunction(cut, devices, outputs)


def _jit_part(
    cut: ProgramPlan,
    part: Part,
    device: Home,
    constants: Mapping[int, Any],
    outputs: Sequence[Output],
) -> Callable[..., list[Any]]:
    """The program of a part."""
    graph = cut.graph
    # What the program takes and gives are arrays; operations are between values.
    # Bundles of small values are split on the way in and joined on the way out.
    takes = [cut.slots[slot] for slot in part.takes]
    gives = [cut.slots[slot] for slot in part.gives]
    wanted = [v for slot in gives for v in slot.values]

    def run(*arrays: Any) -> list[Any]:
        given = dict(constants)
        for slot, array in zip(takes, arrays, strict=True):
            given.update(_split(graph, slot, array))
        made = iter(run_operations(graph, part.operations, given, wanted))
        results = []
        for slot in gives:
            values = [next(made) for _ in slot.values]
            if slot.bundled:
                results.append(jnp.concatenate([v.reshape(-1) for v in values]))
            elif slot.output is None:
                results.append(values[0])
            else:
                # A weak type would make the next step a new one to compile.
                results.append(strong(values[0]))
        return results

    # The name that profiles show.
    run.__name__ = run.__qualname__ = f"fpipe_optim_{part.round}"
    overwritten = [part.takes.index(slot) for slot in part.donates]
    if isinstance(device, Mesh):
        # What goes out lies as its parameter does; what is between programs as it
        # comes.
        lies: list[Sharding | None] = []
        for slot in gives:
            output = None if slot.output is None else outputs[slot.output]
            if output is not None and output.device == device:
                lies.append(output.lies)
            else:
                # Another process has to know how it lies.
                alone = jax.process_count() == 1
                lies.append(None if alone else whole_at(device))
        return jax.jit(run, donate_argnums=donated(overwritten), out_shardings=lies)
    if not takes:
        # Without arguments nothing else says where it runs.
        return jax.jit(run, out_shardings=SingleDeviceSharding(device))
    return jax.jit(run, donate_argnums=donated(overwritten))


def _split(graph: UpdateGraph, slot: Slot, array: Any) -> dict[int, Any]:
    """The values in an array."""
    if not slot.bundled:
        return {slot.values[0]: array}
    values = {}
    start = 0
    for v in slot.values:
        shape = graph.avals[v].shape
        end = start + int(np.prod(shape, dtype=np.int64))
        values[v] = array[start:end].reshape(shape)
        start = end
    return values
