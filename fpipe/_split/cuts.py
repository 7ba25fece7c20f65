"""Where a traced function is cut: by marks, by paths of parameters, or by itself.

In: a trace. Out: *places*. The place `p` is before the equation with number `p`: what
stands before it belongs to the piece before. For an encoder and a decoder

    0  dot_general   "enc/w"       first use of enc/w
    1  add           "enc/b"
    2  tanh
    3  dot_general   "dec/w"       first use of dec/w

the path "dec" gives the place 3. The places 2 and 3 are possible: they lie after the
first use of the last parameter before "dec", and not after the first use of "dec"
itself. Of these the narrowest place is taken, which the fewest bytes of data cross, and
the last one of equally narrow places.

A function is traced again for other shapes, for evaluation, and so on. Where that trace
has the same equations, the places are the same. Else marks are looked for again, and
other cuts are found by what they stand before: the first use of a parameter.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from fpipe._core.errors import at_line, shown
from fpipe._split.balance import best_balance
from fpipe._split.crossing import Crossing
from fpipe._split.mark import mark_inside
from fpipe._split.state import StateSides, StateSpans
from fpipe._split.trace import Function, Traced
from fpipe.schedules._checks import counted

# A place in a module is narrow if hardly more bytes cross it than cross the two ends of
# the module. The tolerance is for small values, such as a mask that is read for the
# last time there.
_NARROW = 1.1

# A module with more than this share of the whole cost may be cut anywhere.
_LARGE = 0.5


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where the first trace is cut, and how to find the places in others.

    Attributes:
        places: in the first trace, in order.
        names: of each piece after a place, as its author called it; `""`: not at all.
        marked: whether marks say where.
        before: for each place the roots (parameters, and rows of parameters) that are
            first used after it, in that order.
        state: for each place the leaves of the state on its two sides.
    """

    places: tuple[int, ...]
    names: tuple[str, ...]
    marked: bool
    before: tuple[tuple[int, ...], ...]
    state: tuple[StateSides, ...]


def find_cuts(
    function: Function,
    traced: Traced,
    paths: Sequence[str] | None,
    stages: int | None,
) -> Cuts:
    """Where to cut the first trace of a function.

    Arguments:
        paths: where the user cuts by parameters.
        stages: into how many pieces it cuts by itself; `None`: at every narrow place.

    Raises:
        ValueError: a path that leads to no parameter that is used; a mark inside an
            equation; too few places.
    """
    _refuse_marks_inside(traced)
    marks = traced.marks
    marked = bool(marks) and paths is None
    if paths is not None:
        places = _places_of_paths(function, traced, paths)
    elif marks:
        places = [mark.place for mark in marks]
    else:
        places = _own_places(function, traced, stages)
    names = [mark.name for mark in marks] if marked else [""] * len(places)
    first = sorted(traced.first_uses.items(), key=lambda use: (use[1], use[0]))
    before = [tuple(root for root, use in first if use >= p) for p in places]
    spans = StateSpans.of(traced)
    sides = tuple(map(spans.sides, places))
    return Cuts(tuple(places), tuple(names), marked, tuple(before), sides)


def places_in(cuts: Cuts, first: Traced, traced: Traced) -> tuple[int, ...]:
    """The places of the same cuts in another trace.

    Raises:
        ValueError: a cut is not there.
    """
    if traced is first:
        return cuts.places
    if cuts.marked:
        _refuse_marks_inside(traced)
        places = [mark.place for mark in traced.marks]
        if len(places) != len(cuts.places):
            raise ValueError(
                f"`fpipe.cut(h)`: the function has {len(cuts.places)} marks when it is "
                f"split, but {len(places)} when it is traced for this call: all traces "
                "(other shapes, `train`, no key) need the same marks"
            )
        return tuple(places)
    if traced.form == first.form:
        return cuts.places
    used, crossing = traced.first_uses, Crossing(traced)
    found = []
    for roots, sides in zip(cuts.before, cuts.state, strict=True):
        root = next((root for root in roots if root in used), None)
        place = None if root is None else crossing.narrowest_before(used[root], sides)
        if root is not None and place is None:
            raise ValueError(
                "`fpipe.split(fn)`: traced for this call (other shapes, `train`, no "
                "key) the function reads a state before each place of a cut, and makes "
                "its new value after it. One piece must read and write each array of a "
                "state: split it with an example of this call, such as `train=True`"
            )
        if place is None or (found and place <= found[-1]):
            raise ValueError(
                "`fpipe.split(fn)`: traced for this call (other shapes, `train`, no "
                "key) the function uses its parameters in another order than when it "
                "was split, so its cuts are not found: mark them by `h = fpipe.cut(h)`"
            )
        found.append(place)
    return tuple(found)


# --- marks ---


def _refuse_marks_inside(traced: Traced) -> None:
    for node in traced.graph.nodes:
        mark = mark_inside(node)
        if mark is not None:
            raise ValueError(
                f"`fpipe.cut(h)`{at_line(mark.where)} stands inside a `{node.name}`"
                f"{at_line(node.where)}, which runs as one operation: put the mark "
                "before or after the loop, the branch or the function with its own "
                "derivative"
            )


# --- paths ---


def _places_of_paths(
    function: Function, traced: Traced, paths: Sequence[str]
) -> list[int]:
    """A place before the first use of the parameters under each path."""
    first, crossing = traced.first_uses, Crossing(traced)
    beginning = min(first.values(), default=0)
    found = set[int]()
    for path in paths:
        mine = _roots_under(function, traced, path)
        uses = [first[root] for root in mine if root in first]
        if not uses:
            what = "no parameter with that path is used" if mine else "there is none"
            some = ", ".join(map(repr, function.paths[:5]))
            raise ValueError(
                f"`fpipe.split(cuts=[{shown(path)}])`: {what}; the paths are {some}"
                f"{', …' if len(function.paths) > 5 else ''}. A prefix consists of "
                "whole parts: 'h/1' is no prefix of 'h/10'"
            )
        # The first piece begins where the function does.
        if min(uses) > beginning:
            place = crossing.narrowest_before(min(uses))
            if place is None:
                raise ValueError(
                    f"`fpipe.split(cuts=[{shown(path)}])`: a state is read before each "
                    "place there, and its new value is made after it. One piece must "
                    "read and write each array of a state: cut at another path"
                )
            found.add(place)
    return sorted(found)


def _roots_under(function: Function, traced: Traced, path: str) -> list[int]:
    """The roots under a path; of a stacked parameter it may end with a row."""
    named = [function.paths[rows.leaf] for rows in traced.roots]
    mine = [root for root, name in enumerate(named) if is_under(name, path)]
    stack, _, row = path.rpartition("/")
    if mine or not row.isdecimal():
        return mine
    return [
        root
        for root, rows in enumerate(traced.roots)
        if not rows.whole
        and rows.start == int(row)
        and (not stack or is_under(named[root], stack))
    ]


def leaves_under(function: Function, paths: Sequence[str]) -> frozenset[int]:
    """The leaves of the parameters that a user cuts before, or before rows of them."""
    found = set[int]()
    for path in paths:
        stack, _, row = path.rpartition("/")
        for prefix in (path, stack) if row.isdecimal() else (path,):
            named = enumerate(function.paths)
            mine = {leaf for leaf, name in named if is_under(name, prefix)}
            found |= mine
            if mine:
                break
    return frozenset(found)


def is_under(path: str, prefix: str) -> bool:
    """Whether a path begins with a prefix, by whole parts: `h/1` with `h`, and `h/10`
    not with `h/1`.
    """
    return path == prefix or path.startswith(prefix + "/")


# --- by itself ---


def _own_places(function: Function, traced: Traced, stages: int | None) -> list[int]:
    """Places that nobody has named: all narrow ones, or the best ones."""
    crossing = Crossing(traced)
    # Between any two first uses of parameters that follow each other.
    found = [crossing.narrowest_before(use) for use in crossing.uses[1:]]
    every = [place for place in found if place is not None]
    places = _between_modules(function, traced, every)
    if stages is None:
        return _narrow_places(function, crossing, places)
    if len(places) < stages - 1:
        places = every
    if len(places) < stages - 1:
        raise ValueError(
            f"`fpipe.split(stages={stages})`: the function has "
            f"{counted(len(places), 'place')} to cut at, between the first uses of "
            "parameters on the way of the data: ask for fewer stages, or mark places "
            "with `h = fpipe.cut(h)`"
        )
    return _best_places(crossing, places, stages)


def _between_modules(
    function: Function, traced: Traced, places: Sequence[int]
) -> list[int]:
    """The places that do not divide a module: what has its parameters right under one
    path, such as the weights and the bias of one layer, the same rows of what is
    stacked; and a round of a loop. If there are none, all.
    """
    modules = _modules(function.paths)
    spans: dict[Hashable, list[int]] = {}
    for root, use in traced.first_uses.items():
        rows = traced.roots[root]
        module = modules[rows.leaf]
        # The root of the tree is no module: all parameters may be directly under it.
        if module or not rows.whole:
            key = (module, None if rows.whole else rows.start)
            spans.setdefault(key, []).append(use)
    spans.update({span: [span[0], span[-1]] for span in traced.rounds if span})
    # How many modules have begun and not ended at each place.
    open_at = np.zeros(len(traced.graph.nodes) + 2, int)
    for uses in spans.values():
        open_at[min(uses) + 1] += 1
        open_at[max(uses) + 1] -= 1
    divided = np.cumsum(open_at)
    return [p for p in places if not divided[p]] or list(places)


def _modules(paths: Sequence[str]) -> list[str]:
    """For each parameter the path of its module; `""`: the root."""
    parts = [path.split("/") for path in paths]
    # In a state of NNX every path ends with `value`.
    alike = len({own[-1] for own in parts}) == 1 and all(len(own) > 1 for own in parts)
    return ["/".join(own[: -2 if alike else -1]) for own in parts]


def _narrow_places(
    function: Function, crossing: Crossing, places: Sequence[int]
) -> list[int]:
    """The given places, except those in the middle of a small group of modules under
    one path that more bytes cross than cross its two ends.

    Such a group is the attention of a transformer's block, or its MLP: two values cross
    every place but its ends, the residual stream and what is added to it. In a U-Net
    more and more bytes cross the places towards its middle. It is cut there all the
    same, because its encoder is no small part of it.
    """
    across, work = crossing.bytes, np.cumsum([0.0, *work_at_places(crossing)])
    ends = [0, *places, len(work) - 1]
    dropped = set[int]()
    for uses in _uses_by_path(function, crossing.traced).values():
        # The places around it, and those that divide it.
        first = bisect.bisect_right(ends, min(uses)) - 1
        last = bisect.bisect_right(ends, max(uses))
        begin, end = ends[first], ends[last]
        if work[end] - work[begin] <= work[-1] * _LARGE:
            most = max(across[begin], across[end]) * _NARROW
            dropped.update(p for p in ends[first + 1 : last] if across[p] > most)
    return [p for p in places if p not in dropped]


def _uses_by_path(function: Function, traced: Traced) -> dict[str, list[int]]:
    """The first uses of the parameters under each path that several are under."""
    found: dict[str, list[int]] = {}
    for root, use in traced.first_uses.items():
        path = function.paths[traced.roots[root].leaf]
        while "/" in path:
            path = path.rpartition("/")[0]
            found.setdefault(path, []).append(use)
    return {path: uses for path, uses in found.items() if min(uses) < max(uses)}


def work_at_places(crossing: Crossing) -> np.ndarray:
    """What the equations cost that run at each place. What needs no data, or costs less
    to make than to send, runs where it is used.
    """
    traced, moved = crossing.traced, crossing.made_where_read
    found = np.zeros(len(traced.graph.nodes))
    used_at = dict[int, int]()
    for node in reversed(traced.live):
        at = traced.position[node]
        if traced.of_data.isdisjoint(node.outs) or moved.issuperset(node.outs):
            at = min((used_at[v] for v in node.outs if v in used_at), default=at)
        found[at] += traced.costs[node]
        for v in node.ins:
            used_at[v] = min(at, used_at.get(v, at))
    return found


def _best_places(crossing: Crossing, places: Sequence[int], stages: int) -> list[int]:
    """Of some places those that `best_balance` cuts at."""
    parts = np.split(work_at_places(crossing), places)
    work = [float(part.sum()) for part in parts]
    sizes = best_balance(work, crossing.sent(places), stages)
    return [places[end - 1] for end in itertools.accumulate(sizes[:-1])]
