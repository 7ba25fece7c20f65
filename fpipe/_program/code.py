"""Programs: what they take and return by name, and what they compute as data.

A stage is split into programs, one for each kind of action. The backward of a middle
stage `y = tanh(x @ w)`, for example:

    Program(
        name="stage1_B",
        code=Code(...),                     what it computes: a part of a graph
        call=<jitted fpipe_B>,
        ins=(Input(params 1[0]), Input(x[0]), Cotangent(y[0]), Output(y[0]),
             GradientSum(params 1[0])),
        outs=(Gradient(x[0]), GradientSum(params 1[0])),
        aliases={},
        calls_host=False,
    )

The names say which array goes where; the executors find a place for each. The code says
nothing of stages, so that stages that compute the same share it, compiled.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import on_host
from fpipe._core.settings import donated
from fpipe._model.stages import Leaf
from fpipe._program.graph import Bind, Graph, Node, bind, evaluate
from fpipe._program.host_calls import Failures, Guard, Logged, evaluate_guarded
from fpipe._program.identity import identity
from fpipe._program.products import exchange_products

# --- what a program takes and returns ---


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """A leaf that enters the stage."""

    leaf: Leaf

    def __str__(self) -> str:
        return str(self.leaf)


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """A leaf that leaves the stage."""

    leaf: Leaf

    def __str__(self) -> str:
        return str(self.leaf)


@dataclasses.dataclass(frozen=True, slots=True)
class Residual:
    """A value that `F` hands to the backward; the stage's residuals are numbered."""

    number: int

    def __str__(self) -> str:
        return f"residual {self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Recomputed:
    """A value that `R` makes again for the backward; a stage's are numbered."""

    number: int

    def __str__(self) -> str:
        return f"recomputed {self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Handed:
    """A value that `I` hands to `W`; the stage's handed values are numbered."""

    number: int

    def __str__(self) -> str:
        return f"handed {self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Cotangent:
    """A cotangent of an output leaf: one of several, where several stages read it."""

    leaf: Leaf
    number: int = 0

    def __str__(self) -> str:
        return f"cotangent {self.leaf}"


@dataclasses.dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of an input leaf, for one microbatch."""

    leaf: Leaf

    def __str__(self) -> str:
        return f"gradient {self.leaf}"


@dataclasses.dataclass(frozen=True, slots=True)
class GradientSum:
    """The accumulated gradient of an input leaf that all microbatches share."""

    leaf: Leaf

    def __str__(self) -> str:
        return f"sum {self.leaf}"


# What stays on its stage: it goes from one of its programs to another.
Inside: TypeAlias = Residual | Recomputed | Handed

ProgramValue: TypeAlias = Input | Output | Inside | Cotangent | Gradient | GradientSum


# --- a program ---


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of flat arrays.

    Attributes:
        name: as it appears in plans.
        code: what it computes; `None` if there is nothing to run.
        call: the compiled function of `code`; `None` too where codes are not compiled
            one by one.
        ins, outs: what it takes and returns.
        aliases: outputs that are another value as it is: an input, or another output.
            They need no place of their own (`jit` would copy them).
        calls_host: whether it calls Python while it runs: then whoever dispatches it
            may have to wait for it.
    """

    name: str
    code: "Code | None"
    call: Callable[..., Sequence[Any]] | None
    ins: tuple[ProgramValue, ...]
    outs: tuple[ProgramValue, ...]
    aliases: Mapping[ProgramValue, ProgramValue]
    calls_host: bool


class Window(NamedTuple):
    """A piece that a program cuts out of a whole array, by the microbatch's number.

    So the pieces of a batch never lie beside it, and cutting costs no dispatch of its
    own.

    Attributes:
        stride: rows from one piece to the next; all pieces but the last have as many.
        rows: of this piece.
        axis: of the rows; `None`: the piece is one element of a vector.
    """

    stride: int
    rows: int
    axis: int | None

    def cut(self, whole: Any, index: Any) -> Any:
        """The piece."""
        start = index.astype(jnp.int32) * self.stride
        if self.axis is None:
            return jax.lax.dynamic_index_in_dim(whole, start, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(whole, start, self.rows, self.axis)


class Arg(NamedTuple):
    """An argument of a code.

    Attributes:
        value: the graph's value that it is. Several arguments may have the same: then
            that is their sum. `None` for a number that is no value of the graph: it
            cuts windows, or says where Python was called.
        window: set if the argument is a whole array: the piece of it that is read.
    """

    value: int | None
    window: Window | None = None


# Compared by identity: the graph holds arrays. Codes that compute the same are found by
# `Code.identity`.
@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """What a program computes: a part of a graph, as a function from arrays to arrays.

    The `W` of `y = tanh(x @ w)`, in a graph where `x` is value 1, what `I` hands over
    is value 9, and the weight gradient is value 11, is called as

        code(x, handed, sum)  ->  [sum + value 11]     args (1, 9), outs (), sums (11,)

    Attributes:
        kind: of action.
        args: its arguments; those to accumulate into follow, one for each of `sums`.
        index: which argument is the microbatch's number.
        constants: values of the graph that are a constant all over.
        outs, sums: the values that it returns, and after them those whose sum over all
            microbatches is wanted.
        accumulate: whether the sums so far come in; they are donated.
        guard: how the Python that it calls is guarded; `None`: it calls none.
        donated: which of its arguments, by their numbers, it consumes beside the sums.
        maxima: which of `sums`, by their place among them, are no sums but maxima over
            all microbatches.
    """

    kind: str
    graph: Graph
    nodes: tuple[Node, ...]
    args: tuple[Arg, ...]
    index: int | None
    constants: tuple[tuple[int, float], ...]
    outs: tuple[int, ...]
    sums: tuple[int, ...]
    accumulate: bool
    guard: Guard | None = None
    maxima: tuple[int, ...] = ()
    donated: tuple[int, ...] = ()

    def __call__(
        self, *arrays: Any, failures: Failures | Logged | None = None
    ) -> list[Any]:
        """Run the equations, or trace them again.

        Arguments:
            failures: where exceptions of the Python that it calls are kept; `None`:
                they are raised.
        """
        results = self.values(arrays, (*self.outs, *self.sums), failures)
        return self.added(results, arrays)

    def added(self, results: list[Any], arrays: Sequence[Any]) -> list[Any]:
        """What the program returns: its values, those of `sums` added to the sums so
        far, if they come in.
        """
        if self.accumulate:
            # The addition is part of the program: as one of its own it would be another
            # dispatch for each microbatch. The sum decides the dtype: gradients of
            # bfloat16 parameters are summed in float32, and cast once at the end.
            so_far = arrays[len(self.args) :]
            for k, total in enumerate(so_far):
                n = len(self.outs) + k
                add = jnp.maximum if k in self.maxima else jnp.add
                results[n] = add(total, results[n].astype(total.dtype))
        return results

    def values(
        self,
        arrays: Sequence[Any],
        wanted: Sequence[int],
        failures: Failures | Logged | None = None,
        cut: Callable[[int, Any, Any], Any] | None = None,
        bind: Bind = bind,
    ) -> list[Any]:
        """Values of the graph, from the arguments.

        Arguments:
            arrays: one for each of `args`, or more.
            failures: as for a call.
            wanted: not only what the program returns: the sums of rows that are made
                device by device start from other values.
            cut: `cut(n, array, index)` is the piece of the `n`-th argument that has a
                window, if it is not what the window cuts out of a whole array.
            bind: runs an equation.
        """
        # A constant fill, for example the cotangent of an output that nobody reads, is
        # made here, so that XLA can fold it. As an argument it would be an array to
        # keep and pass.
        given: dict[int, Any] = {}
        for v, fill in self.constants:
            aval = self.graph.avals[v]
            given[v] = jnp.full(aval.shape, fill, aval.dtype)
        # Not strict: the sums so far follow the arguments.
        pairs = zip(self.args, arrays, strict=False)
        for n, ((v, window), array) in enumerate(pairs):
            if v is None:
                continue
            # Several arguments of the same value are terms of its sum: one addition
            # more in the program, in place of one more dispatch.
            piece = array
            if window is not None and self.index is not None:
                index = arrays[self.index]
                piece = (
                    window.cut(array, index) if cut is None else cut(n, array, index)
                )
            given[v] = given[v] + piece if v in given else piece
        bind = exchange_products(self.nodes, wanted, bind)
        if self.guard is None:
            return evaluate(self.graph, self.nodes, given, wanted, bind)
        return evaluate_guarded(
            self.graph,
            self.nodes,
            given,
            wanted,
            self.guard,
            [arrays[self.guard.first], arrays[self.guard.index]],
            failures,
            bind,
        )

    @property
    def on_host(self) -> dict[int, Any]:
        """The types of those results that lie in the host's memory, by number."""
        results = enumerate((*self.outs, *self.sums))
        types = ((n, self.graph.avals[v]) for n, v in results)
        return {n: aval for n, aval in types if on_host(aval)}

    @property
    def identity(self) -> Hashable:
        """Equal for codes that compute the same, whatever stage they are of."""
        # The numbers of values differ from stage to stage, so all that names a value is
        # told by the position of the value among those that come in.
        read = [arg.value for arg in self.args if arg.value is not None]
        given = list(dict.fromkeys([*read, *(v for v, _ in self.constants)]))
        position = {v: n for n, v in enumerate(given)}
        return (
            self.kind,
            identity(self.graph, self.nodes, given, (*self.outs, *self.sums)),
            tuple((None if v is None else position[v], w) for v, w in self.args),
            self.index,
            tuple((position[v], fill) for v, fill in self.constants),
            len(self.sums),
            self.accumulate,
            None if self.guard is None else self.guard.identity(self.nodes),
            self.maxima,
            self.donated,
        )

    def compile(self) -> Callable[..., Sequence[Any]]:
        """The function under `jax.jit`.

        It is traced once, lowered once, and compiled once for each device that runs it.
        """

        def call(*arrays: Any) -> list[Any]:
            return self(*arrays)

        # The name by which profiles and compiled programs are told apart. It has the
        # kind and not the stage: equal stages share the function.
        call.__name__ = call.__qualname__ = f"fpipe_{self.kind}"
        return jax.jit(call, donate_argnums=donated(self.consumed))

    @property
    def consumed(self) -> tuple[int, ...]:
        """The arguments whose memory it may take for its results."""
        # Only sums are donated, and what the caller has handed over. Another argument
        # may be the user's parameter, or an alias of it: `device_put` to the same
        # device copies nothing.
        sums = range(len(self.args), len(self.args) + len(self.sums))
        return (*self.donated, *(sums if self.accumulate else ()))


# Makes the function of a code, or finds that of a code with the same identity. The scan
# executor's gives the code back as it is: codes become branches of its one program.
Compile: TypeAlias = Callable[[Code], Callable[..., Sequence[Any]]]
