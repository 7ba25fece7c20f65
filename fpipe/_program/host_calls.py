"""Python that a layer calls while it runs, and the exceptions that it raises there.

`jax.pure_callback`, `io_callback` and `jax.debug.callback` run on a thread of a device.
JAX makes a text of what they raise, and that text arrives where somebody waits for a
result, far from the layer. So each callback is bound as a *guarded* one, which says
where it was called:

    BoomError: out of data
    fpipe: in layer 3 'read', stage 1, microbatch 2

It takes two numbers more than the user's function: the first layer of the stage, and
the microbatch. They are arguments of the program, because equal stages share it.

In a program of one device the exception is raised at once. In a program of several, the
others would wait for that device in their next collective: on CPU for 40 s, and then
the process is ended. There it is kept, and zeros go on in its place, until all devices
can raise it together; see `Failures`.

In: the equations of a program's code. Out: the same, bound with their callbacks
guarded, also in the bodies of loops and branches.
"""

import dataclasses
import logging
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.errors import PREFIX
from fpipe._model.scopes import LOSS_SCOPE, layer_in
from fpipe._program.control_flow import calls_host
from fpipe._program.graph import Bind, Graph, Node, bind
from fpipe._program.retracing import retrace

_LOGGER = logging.getLogger(__name__)

_DOING = {
    "F": "in",
    "R": "in the recomputation of",
    "B": "in the backward of",
    "I": "in the input gradient of",
    "W": "in the weight gradient of",
}


class CallbackError(Exception):
    """An exception in a callback, and where it was called, as text.

    Users do not catch it: JAX raises a `JaxRuntimeError` with its text.
    """


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the layers of a pipe are, for what is said of an exception.

    Attributes:
        names: of the layers.
        stage_of: the stage of each layer.
    """

    names: tuple[str, ...]
    stage_of: tuple[int, ...]

    def where(self, kind: str, layer: int | None, first: int, microbatch: int) -> str:
        """A place in words.

        Arguments:
            kind: of action.
            layer: or `LOSS_SCOPE`; `None`: it is not known which one of the stage.
            first: the first layer of the stage, or of the part of it that ran; after
                the last one for a part that has the loss alone.
        """
        stage = self.stage_of[min(first, len(self.stage_of) - 1)]
        if layer == LOSS_SCOPE:
            what = "loss_fn"
        else:
            own = [k for k, s in enumerate(self.stage_of) if s == stage]
            layers = own if layer is None else [layer]
            what = "layers " if len(layers) > 1 else "layer "
            what += ", ".join(f"{k} {self.names[k]!r}" for k in layers)
        return f"{_DOING[kind]} {what}, stage {stage}, microbatch {microbatch}"


class Failures:
    """What callbacks have raised in a program of several devices.

    The program asks at its end, on each device, whether there is something (`look`).
    The answers are added up over the devices: that is a collective, so after it all
    callbacks of all devices have been called, and all devices know. Then each of them
    calls `throw`, so that none is left waiting for another:

        device 0   ticks            look -> 0   1   throw
        device 1   ticks, raised    look -> 1   1   throw

    Only texts are kept: an exception holds the arrays of its frames.

    Arguments:
        devices: how many of the program's devices are of this process.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._lock = threading.Lock()
        self._kept = ""
        self._thrown = ""
        self._throws = 0

    @property
    def any(self) -> bool:
        """Whether a callback of this run has raised: then the others need not run."""
        return self._kept != ""

    def keep(self, text: str) -> None:
        """Keep what a callback raised; the first one counts."""
        with self._lock:
            self._kept = self._kept or text

    def look(self, *_: Any) -> Any:
        """On a device, after its last tick: whether something is kept."""
        return np.int32(self.any)

    def throw(self, *_: Any) -> Any:
        """On each device, when all have looked: raise it."""
        with self._lock:
            # The first device that throws clears what is kept. The first that looks
            # must not clear it, because callbacks of this run may be called until all
            # have looked. The last that throws must not clear it either, because the
            # first one may have begun the next run by then and kept something new.
            if self._throws == 0:
                self._thrown = self._kept or "an exception in another process"
                self._kept = ""
            self._throws = (self._throws + 1) % self._devices
            text = self._thrown
            if self._throws == 0:
                self._thrown = ""
        raise CallbackError(text)

    def raised(self, after: Sequence[Any], axis: str | tuple[str, ...]) -> Any:
        """Inside a program: a zero, or on all devices of some axes what is kept.

        Arguments:
            after: arrays that are there when all callbacks have been called.
        """
        token = jax.ShapeDtypeStruct((), jnp.int32)
        # One element of each array will do: it is there when the array is.
        probes = [a.reshape(-1)[:1] for a in after]
        found = jax.pure_callback(self.look, token, *probes)
        found = jax.lax.psum(found, axis)
        return jax.lax.cond(
            found > 0,
            lambda found: jax.pure_callback(self.throw, token, found),
            lambda found: found,
            found,
        )


class Logged:
    """In place of `Failures` where no device can ask the host: what callbacks have
    raised is logged.

    Where this is used JAX refuses callbacks that return something. So an exception in a
    callback makes no result wrong.
    """

    any = False

    def keep(self, text: str) -> None:
        """Log what a callback raised."""
        # This is no warning, because Python may be set to raise warnings as errors.
        _LOGGER.error("%s", text)


@dataclasses.dataclass(frozen=True)
class Guard:
    """How the callbacks of a code are guarded.

    Attributes:
        kind: of action.
        places: of the pipe.
        start: the first layer of the stage that was traced. Equal stages share the
            code, and their layers have the same distance from the first.
        first, index: which arguments are the first layer and the microbatch.
    """

    kind: str
    places: Places
    start: int
    first: int
    index: int

    def distance(self, node: Node) -> int | None:
        """A node's layer, counted from the first of its stage; or `LOSS_SCOPE`."""
        layer = layer_in(node.scope)
        if layer is None or layer == LOSS_SCOPE:
            return layer
        return layer - self.start

    def identity(self, nodes: Iterable[Node]) -> Hashable:
        """Equal for guards that say the same of the same nodes."""
        return self.places, self.first, self.index, tuple(self._distances(nodes))

    def _distances(self, nodes: Iterable[Node]) -> Iterator[int | None]:
        """The layer of each node that calls Python, at any depth, as a distance."""
        for node in nodes:
            if calls_host([node]):
                yield self.distance(node)
                for body in node.bodies:
                    yield from self._distances(body.nodes)


def evaluate_guarded(
    graph: Graph,
    nodes: Iterable[Node],
    given: Mapping[int, Any],
    wanted: Sequence[int],
    guard: Guard,
    numbers: Sequence[Any],
    failures: Failures | Logged | None,
    bind: Bind = bind,
) -> list[Any]:
    """`evaluate`, with guarded callbacks.

    Arguments:
        numbers: the first layer of the stage, and the microbatch.
        failures: where exceptions are kept; `None`: they are raised.
        bind: runs an equation that calls no Python.
    """
    binder = _Binder(guard, numbers, failures, bind)
    return binder.run(graph, nodes, given, wanted, None)


@dataclasses.dataclass(frozen=True)
class _Binder:
    """Binds equations with their callbacks guarded; the attributes are the arguments of
    `evaluate_guarded`.
    """

    guard: Guard
    numbers: Sequence[Any]
    failures: Failures | Logged | None
    bind: Bind

    def run(
        self,
        graph: Graph,
        nodes: Iterable[Node],
        given: Mapping[int, Any],
        wanted: Sequence[int],
        layer: int | None,
    ) -> list[Any]:
        """Run equations; `layer` is that of the equation whose body they are."""
        values = {**graph.consts, **given}
        for node in nodes:
            inputs = [values[v] for v in node.ins]
            if calls_host([node]):
                results = self._bind(node, inputs, layer)
            else:
                results = self.bind(node, inputs)
            values.update(zip(node.outs, results, strict=True))
        return [values[v] for v in wanted]

    def _bind(
        self, node: Node, inputs: Sequence[Any], layer: int | None
    ) -> Sequence[Any]:
        """Run an equation that calls Python."""
        own = self.guard.distance(node)
        layer = layer if own is None else own
        params = node.eqn.params
        if "callback" in params:
            results = [v.aval for v in node.eqn.outvars]
            callback = self._guarded(params["callback"], results, layer)
            return bind(node, [*inputs, *self.numbers], callback=callback)
        if node.name == "debug_print":
            # A `jax.debug.print` has a format in place of a function, and the format
            # may not fit. If the arrays are concrete, the equation prints at once.
            jax.debug.callback(
                self._guarded(lambda *own: bind(node, own), [], layer),
                *inputs,
                *self.numbers,
                ordered=params["ordered"],
                partitioned=params["partitioned"],
            )
            return []
        # An equation with a body is written once more, with the guarded callbacks in
        # it. The numbers are values of the trace outside.
        return retrace(node, inputs, lambda body: self._function(body, layer))

    def _function(self, body: Graph, layer: int | None) -> Callable[..., list[Any]]:
        """A body as a function."""

        def run(*values: Any) -> list[Any]:
            given = dict(zip(body.inputs, values, strict=True))
            return self.run(body, body.nodes, given, body.outputs, layer)

        return run

    def _guarded(
        self, function: Callable[..., Any], results: Sequence[Any], layer: int | None
    ) -> Callable[..., Any]:
        """A callback that returns arrays like `results`, guarded."""
        guard, failures = self.guard, self.failures

        def zeros() -> list[Any]:
            return [np.zeros(a.shape, a.dtype) for a in results]

        def guarded(*args: Any) -> Any:
            *own, first, microbatch = args
            # After an exception zeros stand in place of results. A callback is not
            # called with these.
            if failures is not None and failures.any:
                return zeros()
            try:
                return function(*own)
            except Exception as error:
                text = _told(error)
            except BaseException as error:
                # A Ctrl-C too: in a program of several devices it waits like any other
                # exception.
                if failures is None:
                    raise
                text = _told(error)
            # Outside of the `except`, so that the exception and all that its frames
            # hold are gone.
            first = int(first)
            number = first + layer if layer not in (None, LOSS_SCOPE) else layer
            where = guard.places.where(guard.kind, number, first, int(microbatch))
            text = f"{text}\n{PREFIX}{where}"
            if failures is None:
                raise CallbackError(text)
            failures.keep(text)
            return zeros()

        return guarded


def _told(error: BaseException) -> str:
    """An exception as Python prints it, from the user's function on."""
    # The first frame is that of the guard.
    frames = error.__traceback__ and error.__traceback__.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
