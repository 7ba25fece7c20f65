"""What a program takes: FLOPs or bytes, counted in what it lowers to, or seconds,
measured on its device.

XLA's cost analysis counts a lowered program. That needs no device and compiles nothing,
but XLA counts the body of a loop once, and gives up on calls of Python. So equations
with loops or callbacks are taken out and counted by themselves: a `scan` as often as it
runs, a `cond` by its most expensive branch, a `while` once (nobody knows how often it
runs), a callback not at all.

    y = tanh(x @ w); z = scan(body, y, length=5)    counts as
    lowered(x @ w, tanh) + 5 * lowered(body)

To count the equations of a jaxpr by rules of one's own would need a rule for every
primitive; XLA has them. Only where a function is cut, which looks at each equation by
itself, rules count its forward (`fpipe._program.flops`, where it says how far the two
agree).
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.processes import gather_floats
from fpipe._core.pytrees import on_host
from fpipe._executors.placement import (
    Placement,
    as_argument,
    over_processes,
    zeros_at,
)
from fpipe._executors.plan_data import Work
from fpipe._program.code import Code
from fpipe._program.control_flow import calls_host, has_loop
from fpipe._program.graph import Graph, Node, evaluate

# The names of XLA's counts.
Counted: TypeAlias = Literal["flops", "bytes accessed"]

# Programs that are compared run in so many turns. What else a machine does comes in
# bursts: a program that has all of its runs in one burst looks slow beside the others.
TURNS = 3

# How often `measure` runs a program in each turn, after one time that is not counted.
_REPEATS = 3


# --- counting ---


def count(code: Code, what: Counted) -> float:
    """What a program takes."""
    return _count(code.graph, code.nodes, (*code.outs, *code.sums), what)


def _count(
    graph: Graph, nodes: Sequence[Node], wanted: Iterable[int], what: Counted
) -> float:
    """What the equations `nodes` take that make the values `wanted`."""
    # Everything else is one lowered program, not one for each equation: there may be
    # thousands, and each lowering takes its time.
    apart = [node for node in nodes if has_loop(node) or calls_host([node])]
    inside = [node for node in nodes if node not in apart]
    total = sum(_count_apart(node, what) for node in apart)
    made = {v for node in inside for v in node.outs}
    read_apart = [v for node in apart for v in node.ins]
    outs = [v for v in dict.fromkeys([*wanted, *read_apart]) if v in made]
    if not outs:
        return total
    # What the equations apart make comes in as an argument of the rest.
    ins = sorted({v for node in inside for v in node.ins} - made - set(graph.consts))

    # A shape does not say that an array lies on the host, so it is put there.
    def call(*arrays: Any) -> list[Any]:
        given = {
            v: jax.device_put(a, jax.memory.Space.Host)
            if on_host(graph.avals[v])
            else a
            for v, a in zip(ins, arrays, strict=True)
        }
        return evaluate(graph, inside, given, outs)

    shapes = [
        jax.ShapeDtypeStruct(graph.avals[v].shape, graph.avals[v].dtype) for v in ins
    ]
    return total + _count_lowered(jax.jit(call).lower(*shapes), what)


def _count_lowered(lowered: Any, what: Counted) -> float:
    """XLA's count; what it knows nothing of, a program that only returns constants for
    example, takes nothing.
    """
    found: Any = lowered.cost_analysis()
    if found is None:  # a backend that counts compiled programs only
        found = lowered.compile().cost_analysis()
    # Some backends give one count for each of several programs.
    counts = found if isinstance(found, (list, tuple)) else [found or {}]
    return max(0.0, sum(float(c.get(what, 0.0)) for c in counts))


def _count_apart(node: Node, what: Counted) -> float:
    """A loop, a branch or a call of Python, by what is in it."""
    parts = [_count(body, body.nodes, body.outputs, what) for body in node.bodies]
    if not parts:
        return 0.0
    if node.name == "cond":
        return max(parts)
    return node.body_runs * sum(parts)


# --- measuring ---


class Measured(NamedTuple):
    """A run of a program, or what several of them take.

    Attributes:
        seconds: from its launch to its end.
        launch: those of the host, until it may go on.
    """

    seconds: float
    launch: float


def runs(
    call: Callable[..., Any],
    arguments: Callable[[], Sequence[Any]],
    warm_up: int,
    repeats: int,
) -> list[Measured]:
    """What some runs take, after some that are not counted.

    Arguments:
        arguments: makes those of a run, for a run may consume them.
    """
    times = []
    for _ in range(warm_up + repeats):
        # Making the arguments must not count, so it is waited for first.
        given = arguments()
        jax.block_until_ready(given)
        started = time.perf_counter()
        made = call(*given)
        launched = time.perf_counter()
        jax.block_until_ready(made)
        times.append(Measured(time.perf_counter() - started, launched - started))
        # The next run may need the memory.
        del given, made
    return times[warm_up:]


def transfer_launch(nbytes: int, source: Placement, target: Placement) -> float:
    """The seconds of the host for a transfer of some bytes from a place to another."""
    shape = jax.ShapeDtypeStruct((nbytes,), jnp.uint8, sharding=source.sharding)
    array = zeros_at(shape)
    repeats = TURNS * _REPEATS
    return least(runs(lambda a: target.put([a]), lambda: [array], 1, repeats)).launch


def measure(every: Sequence[Work]) -> dict[Work, Measured]:
    """The shortest time of some runs of each program, on zeros.

    What else the machine does only adds to a run, so the shortest ones of two programs
    can be compared, wherever they were measured. The programs run in turns, each at
    several moments. Stages that compute the same on one device are measured once.

    Over several processes each one measures the programs of its own devices, and all
    are told of all.
    """
    everywhere = {(work.function, work.placement): work for work in every}
    distinct = {key: work for key, work in everywhere.items() if work.placement.is_here}
    # Tracing and lowering are Python, one after the other; XLA compiles in threads.
    traces = [
        work.function.trace(*map(as_argument, work.arguments))
        for work in distinct.values()
    ]
    lowered = [traced.lower() for traced in traces]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda program: program.compile(), lowered))
    times: dict[Any, list[Measured]] = {key: [] for key in distinct}
    for _ in range(TURNS):
        for (key, work), traced, program in zip(
            distinct.items(), traces, programs, strict=True
        ):
            info = traced.args_info[0]
            times[key].append(_shortest(program, work.arguments, info))
    found = {key: least(each) for key, each in times.items()}
    if over_processes(work.placement for work in every):
        # All processes have the same programs, in one order.
        owners = [min(work.placement.processes) for work in everywhere.values()]
        own = [found.get(key, Measured(0.0, 0.0)) for key in everywhere]
        rows = gather_floats(np.array(own).reshape(-1), _measuring)
        each = rows.reshape(len(rows), -1, 2)
        found = {
            key: Measured(*map(float, each[owner, n]))
            for n, (key, owner) in enumerate(zip(everywhere, owners, strict=True))
        }
    return {work: found[work.function, work.placement] for work in every}


def _shortest(
    compiled: Any, shapes: Sequence[jax.ShapeDtypeStruct], infos: Sequence[Any]
) -> Measured:
    """The seconds of the shortest of some runs, and of the shortest launch.

    Arguments:
        shapes: of the arguments, and where they lie.
        infos: for each argument whether a run consumes it.
    """
    arrays = [zeros_at(shape) for shape in shapes]

    def arguments() -> list[Any]:
        """The same arrays each time; anew those that a run consumes."""
        return [
            zeros_at(shape) if info.donated else array
            for shape, info, array in zip(shapes, infos, arrays, strict=True)
        ]

    return least(runs(compiled, arguments, 1, _REPEATS))


def of_first_process(numbers: Sequence[float]) -> list[float]:
    """The numbers of process 0, in every process: what is decided by them has to be
    the same everywhere.
    """
    return [float(n) for n in gather_floats(np.array(numbers), _measuring)[0]]


def _measuring() -> str:
    return "all processes to measure"


def least(times: Sequence[Measured]) -> Measured:
    """The shortest run, and the shortest launch."""
    return Measured(min(t.seconds for t in times), min(t.launch for t in times))
