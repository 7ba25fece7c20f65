"""What the bodies of loops and checkpointed functions do with stacks of parameters.

In: a body, and which of its inputs are stacks, or numbers that a trace knows. Out: of
which stacks it takes rows alone. For `fori_loop(0, 4, lambda i, h: tanh(h @ w[i]), x)`,
which JAX traces as a `scan` over nothing with the carry `(i, h)`,

    | equation       | reads | makes |     inputs    w 0, i 1, h 2
    | add            | 1     | 3     |     outputs   3, 6
    | dynamic_slice  | 0, 1  | 4     |
    | dot_general    | 2, 4  | 5     |     numbers   1, 3: what `i` begins with is
    | tanh           | 5     | 6     |               known, and what it goes on with
                                         indexed   0, on axis 0
"""

from collections.abc import Iterable

from fpipe._program.control_flow import is_remat, scan_parts
from fpipe._program.graph import Graph, Node
from fpipe._split.by_rows import goes_by_rows, index_operand, indexed_axis


def decided_by(body: Graph, known: Iterable[int]) -> set[int]:
    """The values of a body that some values, and what is written in it, alone
    decide.
    """
    found = {*known, *body.consts}
    for node in body.nodes:
        if not node.bodies and not node.eqn.effects and found.issuperset(node.ins):
            found.update(node.outs)
    return found


def numbers_of_rounds(node: Node, known: set[int]) -> set[int]:
    """The values of a loop's body that are known in each of its rounds.

    Arguments:
        known: the inputs of the body that get known operands of the loop.
    """
    constants, carried = scan_parts(node)
    (body,) = node.bodies
    carry = list(zip(body.inputs[constants:], body.outputs[:carried], strict=False))
    # A part of the carry that is known in one round is known in the next, if it goes on
    # from what is known.
    lost: set[int] = set()
    while True:
        numbers = decided_by(body, known - lost)
        unknown = {v for v, new in carry if v in numbers and new not in numbers}
        if not unknown:
            return numbers
        lost |= unknown


def indexed(body: Graph, stacks: set[int], numbers: set[int]) -> dict[int, int]:
    """The stacks that a body reads only by rows, taken by a known index. Each comes
    with the axis of these rows.

    Arguments:
        numbers: the values that are known.
    """
    # For each stack the axes of all that reads it; `None`: it needs more than rows.
    axes: dict[int, set[int | None]] = {}
    for node in body.nodes:
        for v in stacks.intersection(node.ins):
            axes.setdefault(v, set()).add(_axis_taken(node, v, body, numbers))
    for v in stacks.intersection(body.outputs):
        axes.setdefault(v, set()).add(None)
    return {
        v: axis
        for v, (axis, *others) in ((v, tuple(own)) for v, own in axes.items())
        if axis is not None and not others
    }


def _axis_taken(node: Node, v: int, body: Graph, numbers: set[int]) -> int | None:
    """The axis on which an equation takes rows of a stack; `None`: it reads it
    otherwise.
    """
    if is_remat(node):
        (inner,) = node.bodies
        pairs = list(zip(inner.inputs, node.ins, strict=True))
        own = decided_by(inner, (u for u, outer in pairs if outer in numbers))
        mine = {u for u, outer in pairs if outer == v}
        found = indexed(inner, mine, own)
        axes = set(found.values())
        return axes.pop() if len(found) == len(mine) and len(axes) == 1 else None
    if v != node.ins[0] or node.ins.count(v) > 1:
        return None
    axis = indexed_axis(node, body.avals[v].shape)
    if axis is None or node.ins[index_operand(node, axis)] not in numbers:
        return None
    return axis


def has_loop_over(body: Graph, stacks: set[int]) -> bool:
    """Whether a loop in a body runs over rows of some of its values."""
    if not any(node.name == "scan" or is_remat(node) for node in body.nodes):
        return False
    stacks = set(stacks)
    for node in body.nodes:
        read = stacks.intersection(node.ins)
        if node.name == "scan":
            if not stacks.isdisjoint(node.ins[sum(scan_parts(node)) :]):
                return True
        elif is_remat(node):
            (inner,) = node.bodies
            pairs = zip(inner.inputs, node.ins, strict=True)
            if has_loop_over(inner, {v for v, outer in pairs if outer in read}):
                return True
        elif read and _keeps_rows(node, body):
            stacks.update(node.outs)
    return False


def _keeps_rows(node: Node, body: Graph) -> bool:
    """Whether an equation makes its rows of rows."""
    if node.bodies or len(node.outs) != 1 or not body.avals[node.outs[0]].ndim:
        return False
    return bool(goes_by_rows(node, body.avals, 0))
