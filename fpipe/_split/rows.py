"""What a function does with rows, found by traces of two numbers of them.

In: the trace of a microbatch, and the same with twice the rows. Out: warnings about
what is right for the whole batch and something else for a microbatch. An axis that is
longer in the second trace has rows. Of `h - jnp.mean(h, 0)`, with `h = x @ w`,

    | equation    | of 2 rows | of 4 rows | rows on | reduces over rows   |
    |-------------|-----------|-----------|---------|---------------------|
    | dot_general | [2,3]     | [4,3]     | 0       |                     |
    | reduce_sum  | [3]       | [3]       |         | itself              |
    | div         | [3]       | [3]       |         | by the reduce_sum   |
    | sub         | [2,3]     | [4,3]     | 0       | reads that: a note  |

Equations inside loops, branches and checkpointed functions are not checked: a missing
warning is better than a wrong one.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from fpipe._core.errors import at_line, line_of, warn
from fpipe._core.pytrees import describe
from fpipe._program.graph import Graph, Node, ancestors, dependents, inline
from fpipe._split.mark import is_aux
from fpipe._split.notes import REDUCTIONS
from fpipe._split.trace import Function, Kind, Traced, trace_function
from fpipe.schedules._checks import counted

# Operations that are linear in all their operands together.
# fmt: off
_LINEAR = frozenset((
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type",
    "copy", "cumsum", "expand_dims", "name", "neg", "pad", "reduce_sum", "reshape",
    "rev", "slice", "squeeze", "stop_gradient", "sub", "transpose",
))
# fmt: on
# Operations that are linear in each operand alone.
_BILINEAR = frozenset(("conv_general_dilated", "dot_general", "mul"))
_LINEAR_REDUCTIONS = _LINEAR | _BILINEAR

# Operations along an axis that is kept, with the parameter that names it.
_ALONG = {
    "cumlogsumexp": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumsum": "axis",
    "rev": "dimensions",
    "sort": "dimension",
}


def note_rows(function: Function, kind: Kind, twice: Kind, traced: Traced) -> None:
    """Warn of numbers of rows that are written into a function, and of reductions over
    rows that are not means to the end.

    Arguments:
        kind, traced: the microbatch that it is cut for.
        twice: the same with twice the rows.
    """
    name = function.layer.name
    rows = _rows_of(kind, twice)
    if not rows:
        return
    try:
        other = trace_function(function, twice, roots=traced.all_roots)
    except Exception as error:
        if traced.kept:
            raise  # It has read a value that the first trace has left.
        text = str(error).partition("\n")[0]
        text = text if len(text) <= 200 else text[:199] + "…"
        warn(
            f"`fpipe.split(fn)`: {name!r} can be traced with {counted(rows, 'row')}, "
            f"but not with {2 * rows}{at_line(line_of(error))}: "
            f"{type(error).__name__}: {text}. If the function has a fixed number of "
            "rows, it only runs microbatches of that number: write `x.shape[0]` in its "
            "place"
        )
        return
    first, second = (inline(one.jaxpr, keep_rules=False) for one in (traced, other))
    outputs = first.outputs[: len(traced.outputs)]
    # A loop of Python over rows makes more equations: then they cannot be compared.
    same = _form(first) == _form(second)
    if not same or not RowUse(name, rows, first, second, outputs).note():
        _note_fixed_results(name, rows, traced, other)


def _note_fixed_results(name: str, rows: int, traced: Traced, other: Traced) -> None:
    """Warn of a result that has the same number of rows, however many go in."""
    for v, w in zip(traced.outputs, other.outputs, strict=True):
        a, b = traced.graph.avals[v], other.graph.avals[w]
        if v in traced.of_data and a.shape[:1] == b.shape[:1] == (rows,) != (1,):
            warn(
                f"`fpipe.split(fn)`: {name!r} returns {describe(a)} of {rows} rows and "
                f"{describe(b)} of {2 * rows}: a number of rows is written into it. "
                "Microbatches have other numbers: write `x.shape[0]` in its place"
            )
            return


def _rows_of(kind: Kind, twice: Kind) -> int:
    """The number of rows of a microbatch; 0: nothing is cut."""
    pairs = zip(kind.x.leaves, twice.x.leaves, strict=True)
    longer = [_longer(a, b) for a, b in pairs]
    sizes = [kind.x.leaves[n].shape[axes[0]] for n, axes in enumerate(longer) if axes]
    return sizes[0] if sizes else 0


def _longer(a: Any, b: Any) -> tuple[int, ...]:
    """The axes that are longer in the second of two shapes."""
    pairs = zip(a.shape, b.shape, strict=True)
    return tuple(axis for axis, (m, n) in enumerate(pairs) if m != n)


def _form(graph: Graph) -> Any:
    return [
        (node.name, node.ins, node.outs, [graph.avals[v].ndim for v in node.outs])
        for node in graph.nodes
    ]


@dataclasses.dataclass(frozen=True)
class Reduced:
    """How a value without rows comes from all rows.

    Attributes:
        by: the reduction.
        bent: the first equation after it that is not linear, or the reduction itself;
            `None`: it is linear.
    """

    by: Node
    bent: Node | None


@dataclasses.dataclass(frozen=True, eq=False)
class RowUse:
    """What a function does with rows.

    Attributes:
        name: of the function.
        rows: how many the first trace has.
        graph, twice: its traces, which have the same equations.
        outputs: what it returns, without new state.
    """

    name: str
    rows: int
    graph: Graph
    twice: Graph
    outputs: tuple[int, ...]

    def note(self) -> bool:
        """Warn of all that is found.

        Returns:
            Whether a number of rows is written into the function.
        """
        self._note_rows_that_read_rows()
        self._note_bent_results()
        return self._note_written_means() or self._note_written_sizes()

    def axes(self, v: int) -> tuple[int, ...]:
        """The axes of a value that have rows."""
        return _longer(self.graph.avals[v], self.twice.avals[v])

    @cached_property
    def of_rows(self) -> set[int]:
        """The values that depend on rows."""
        return dependents(self.graph, [v for v in self.graph.inputs if self.axes(v)])

    @cached_property
    def reduced(self) -> Mapping[int, Reduced]:
        """The values that are made of all rows by a known reduction, and have none."""
        found: dict[int, Reduced] = {}
        for node in self.graph.nodes:
            reading = [v for v in node.ins if v in self.of_rows]
            for v in node.outs:
                if not reading or self.axes(v):
                    continue
                before = [found[u] for u in reading if u in found]
                with_rows = [u for u in reading if self.axes(u)]
                if with_rows and node.name in REDUCTIONS:
                    bent = None if node.name in _LINEAR_REDUCTIONS else node
                    found[v] = Reduced(node, bent)
                elif before and not with_rows:
                    bents = [one.bent for one in before if one.bent]
                    bent = node if not _is_linear(node, reading) else None
                    found[v] = Reduced(before[0].by, (*bents, bent)[0])
        return found

    @cached_property
    def means(self) -> set[int]:
        """The values that are divided by the number of rows, and what is made of these.
        Another number, as in `jnp.mean(error**2) / 2`, is a factor of the loss, also
        where it is the number of rows by chance.
        """
        divided: list[int] = []
        for node in self.graph.nodes:
            if node.name in ("div", "mul") and node.ins[0] in self.reduced:
                by = node.ins[1]
                if _differ(self.graph.consts.get(by), self.twice.consts.get(by)):
                    divided.extend(node.outs)
        return dependents(self.graph, divided)

    @cached_property
    def into_state(self) -> set[int]:
        """The values that new state is made of. A batch norm takes the mean of rows and
        hands it on as state: what that means in a pipeline is known of layers.
        """
        return ancestors(self.graph, self.graph.outputs[len(self.outputs) :])

    # --- a number of rows that is written into it ---

    def _note_written_sizes(self) -> bool:
        for node in self.graph.nodes:
            if node.name != "reshape" or self.axes(node.ins[0])[:1] != (0,):
                continue
            (v,) = node.outs
            shape, longer = self.graph.avals[v].shape, self.axes(v)
            # Of one row each leading 1 would look like it.
            if self.rows > 1 and shape[0] == self.rows and longer and longer[0] > 0:
                both = [describe(graph.avals[v]) for graph in (self.graph, self.twice)]
                warn(
                    f"`fpipe.split(fn)`: {self.name!r} has a number of rows written "
                    f"into it, `reshape`{at_line(node.where)}: {both[0]} of "
                    f"{self.rows} rows, {both[1]} of {2 * self.rows}. Microbatches "
                    "have other numbers of rows: write `x.shape[0]`, or -1 there and "
                    "the other sizes"
                )
                return True
        return False

    def _note_written_means(self) -> bool:
        for node in self.graph.nodes:
            if node.name not in ("div", "mul") or node.ins[0] not in self.reduced:
                continue
            by = self.reduced[node.ins[0]].by
            number = self.graph.consts.get(node.ins[1])
            if number is None or np.ndim(number) or self.rows < 2:
                continue
            if node.ins[0] in self.means:
                continue
            if _differ(number, self.twice.consts.get(node.ins[1])):
                continue
            count = (
                self.graph.avals[by.ins[0]].size // self.graph.avals[by.outs[0]].size
            )
            factor = float(number) if node.name == "div" else 1 / (float(number) or 1)
            # Half a sum of squares is a loss also of two rows, and of two numbers.
            if factor in (self.rows, count) and factor != 2:
                warn(
                    f"`fpipe.split(fn)`: {self.name!r} divides a sum over its rows by "
                    f"{factor:g}{at_line(node.where)}, for any number of rows. With "
                    "fewer rows in a microbatch the result is no mean: divide by "
                    "`x.shape[0]`, or write `jnp.mean`"
                )
                return True
        return False

    # --- rows that depend on other rows ---

    def _note_rows_that_read_rows(self) -> None:
        places = dict[str, str]()
        for node in self.graph.nodes:
            source = self._source_of_other_rows(node)
            if source is not None:
                what = f"`{source.name}`{at_line(source.where)}"
                if source is not node:
                    what += f", read by `{node.name}`{at_line(node.where)}"
                places.setdefault(source.where or source.name, what)
        if places:
            what, *more = places.values()
            and_more = f" (and {len(more)} more)" if more else ""
            warn(
                f"`fpipe.split(fn)`: in {self.name!r} a row depends on other rows by "
                f"{what}{and_more}. In a pipeline a row sees only the rows of its "
                "microbatch, not of the batch, as in a batch norm: so the result "
                "depends on `chunks`"
            )

    def _source_of_other_rows(self, node: Node) -> Node | None:
        """The equation by which what an equation makes for each row depends on other
        rows.
        """
        if not any(map(self.axes, node.outs)):
            return None
        for v in node.ins:
            if v in self.reduced:
                by = self.reduced[v].by
                return by if self.into_state.isdisjoint(by.outs) else None
        rows_of_ins = [axes for v in node.ins if (axes := self.axes(v))]
        if rows_of_ins and node.name in _ALONG:
            along = node.eqn.params[_ALONG[node.name]]
            if set(np.atleast_1d(along)) & set(rows_of_ins[0]):
                return node
        # Each row with each other one.
        pairs = len(rows_of_ins) > 1 and all(len(axes) == 1 for axes in rows_of_ins)
        return node if pairs and any(len(self.axes(v)) > 1 for v in node.outs) else None

    # --- numbers that are no means ---

    def _note_bent_results(self) -> None:
        for v in self.outputs:
            reduced = self.reduced.get(v)
            if reduced is None or self.graph.avals[v].shape or reduced.bent is None:
                continue
            # The caller gets one value for each microbatch, and sees what it is.
            if is_aux(self.graph.maker.get(v)):
                continue
            by, bent = reduced.by, reduced.bent
            after = ""
            if bent is not by:
                after = f" and then `{bent.name}`{at_line(bent.where)}"
            warn(
                f"`fpipe.split(fn)`: {self.name!r} returns a number made of all its "
                f"rows by `{by.name}`{at_line(by.where)}{after}, which is no sum or "
                "mean over them. A pipe computes it for each microbatch, and the mean "
                "over microbatches is not its value for the batch: return sums, or "
                'values of rows, and weigh them in the loss (`reduction="weighted"`)'
            )
            return


def _is_linear(node: Node, reading: list[int]) -> bool:
    """Whether an equation is linear in the values that it reads of rows."""
    if node.name in _LINEAR:
        return True
    if node.name in _BILINEAR:
        return len(reading) == 1
    if node.name == "div":
        return node.ins[1] not in reading
    # By a condition that knows nothing of the rows.
    return node.name == "select_n" and node.ins[0] not in reading


def _differ(one: Any, other: Any) -> bool:
    """Whether a constant is another one in the second trace."""
    return one is not None and bool(np.any(one != other))
