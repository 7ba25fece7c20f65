"""What equations take in a step that trains, from shapes alone: the roofline model.

In: a graph, the values that are trained, and what a machine does in the time of moving
a byte. Out: for each equation a cost: how many FLOPs a large matrix product does in the
same time, in the forward and the backward. On a machine that does 8 FLOPs per byte,

    equation       array          cost
    y = x @ w      f32[256,512]   3 * 2 * 256 * 512 * 512   the FLOPs of three products
    z = y + b      f32[256,512]   0                         fused with `tanh`
    h = tanh(z)    f32[256,512]   8 * 5 * 4 * 256 * 512     `y`, `h` and their gradients

A program either waits for its arithmetic or for its memory, so it takes

    max(FLOPs / speed, bytes / bandwidth)

(S. Williams, A. Waterman, D. Patterson, "Roofline", Communications of the ACM 52(4),
2009). FLOPs and bytes are never added up. Of the speed and the bandwidth only the ratio
counts. What moves:

- A matrix product reads both operands and writes its result. In the backward there is
  one more product for each operand that has a gradient.
- A convolution is a product with *patches*: of each position all that its window
  covers. Patches have many times more bytes than the array. With few channels each byte
  of them is used for few FLOPs, and the convolution waits for them.
- Equations that treat each number by itself are fused to one loop, with the reductions
  of what they make. Such a loop moves only what it reads from elsewhere, and what is
  read elsewhere. What a reduction makes is read by another loop.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from fpipe._core.pytrees import is_inexact, nbytes
from fpipe._program.control_flow import is_remat
from fpipe._program.flops import flops
from fpipe._program.graph import Graph, Node


@dataclasses.dataclass(frozen=True)
class Machine:
    """What counts of a kind of device.

    Attributes:
        flops_per_byte: the FLOPs of a large matrix product in the time in which main
            memory moves a byte.
        patches: how often the patches of a convolution go through main memory. Twice,
            if they are written and read. Less, if they are made in a cache, which is
            faster.
    """

    flops_per_byte: float
    patches: float


# Equations that XLA does not fuse with those around them, by how their names begin.
_ALONE = (
    "approx_top_k",
    "cholesky",
    "cum",
    "custom_call",
    "eig",
    "ffi_call",
    "fft",
    "gather",
    "householder",
    "lu",
    "pallas_call",
    "qr",
    "ragged_dot",
    "random_",
    "reduce_window",
    "rng_",
    "scatter",
    "schur",
    "select_and_",
    "sort",
    "svd",
    "top_k",
    "triangular",
    "tridiagonal",
)
_PRODUCTS = ("conv_general_dilated", "dot_general")
_REDUCTIONS = ("argmax", "argmin", "reduce_")
_CONTROL_FLOW = ("cond", "scan", "while")

# They read no more of an operand than they make.
_PARTS = ("dynamic_slice", "gather", "slice")

# What a checkpoint costs beside the same without: its forward runs twice, and its
# backward takes about two forwards.
RECOMPUTED = 4 / 3


def costs(
    graph: Graph, nodes: Sequence[Node], trained: Iterable[int], machine: Machine
) -> dict[Node, float]:
    """What each equation costs, in FLOPs of a large matrix product.

    A loop of fused equations has one cost, and each of its equations a share in it. So
    costs can be added up over any equations.

    Arguments:
        nodes: the equations, in order.
        trained: the values for which gradients are wanted.
    """
    known = _Values.of(graph, nodes, trained, machine)
    found = dict[Node, float]()
    loops = _loops(nodes)
    for loop in loops:
        found.update(_loop_costs(known, loop))
    for node in nodes:
        if node not in found:
            found[node] = _alone(known, node)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Values:
    """The values of some equations.

    Attributes:
        bytes: of each value.
        with_gradient: those that have a gradient.
        readers: the equations that read each value; without those that nobody reads.
    """

    machine: Machine
    bytes: Mapping[int, int]
    with_gradient: Set[int]
    readers: Mapping[int, Sequence[Node]]

    @classmethod
    def of(
        cls,
        graph: Graph,
        nodes: Sequence[Node],
        trained: Iterable[int],
        machine: Machine,
    ) -> "_Values":
        """Of some equations, in order."""
        sizes = dict[int, int]()
        readers: dict[int, list[Node]] = {}
        gradients = set(trained)
        for node in nodes:
            for v in (*node.ins, *node.outs):
                if v not in sizes:
                    sizes[v] = nbytes(graph.avals[v])
            for v in node.ins:
                readers.setdefault(v, []).append(node)
            stops = node.name == "stop_gradient" or gradients.isdisjoint(node.ins)
            if not stops:
                gradients.update(v for v in node.outs if is_inexact(graph.avals[v]))
        return cls(machine, sizes, gradients, readers)

    def has_gradient(self, node: Node) -> bool:
        """Whether a backward runs for an equation."""
        return not self.with_gradient.isdisjoint(node.outs)


# --- what is fused ---


def _is_fused(node: Node) -> bool:
    """Whether an equation is a part of a loop over numbers."""
    if node.bodies:
        # A function with its own derivative, such as `relu`. A `softmax` has several
        # loops in it.
        inside = [inner for body in node.bodies for inner in body.nodes]
        return node.name not in _CONTROL_FLOW and all(
            _is_fused(inner) and not _is_reduction(inner) for inner in inside
        )
    return node.name not in _PRODUCTS and not node.name.startswith(_ALONE)


def _is_reduction(node: Node) -> bool:
    return node.name.startswith(_REDUCTIONS)


def _loops(nodes: Sequence[Node]) -> list[list[Node]]:
    """The equations that are fused with each other, in order.

    The *depth* of an equation is the number of products, reductions and the like before
    it, one after the other. What is fused has one depth, so that no loop waits for
    itself:

        depth 0   y = x @ w
        depth 1   z = y + x      m = sum(z)         one loop
        depth 2   h = z / m                         reads `z` again
    """
    depths = dict[int, int]()
    loop_of = dict[int, int]()
    parent = list[int]()
    members = list[tuple[int, Node]]()

    def root(loop: int) -> int:
        while parent[loop] != loop:
            parent[loop] = parent[parent[loop]]
            loop = parent[loop]
        return loop

    for node in nodes:
        depth = max((depths.get(v, 0) for v in node.ins), default=0)
        fused = _is_fused(node)
        ends = not fused or _is_reduction(node)
        depths.update(dict.fromkeys(node.outs, depth + ends))
        if not fused:
            continue
        own = len(parent)
        parent.append(own)
        members.append((own, node))
        for v in node.ins:
            if v in loop_of and depths[v] == depth:
                parent[root(loop_of[v])] = own
        if not ends:
            loop_of.update(dict.fromkeys(node.outs, own))
    found: dict[int, list[Node]] = {}
    for own, node in members:
        found.setdefault(root(own), []).append(node)
    return list(found.values())


def _loop_costs(known: _Values, loop: Sequence[Node]) -> dict[Node, float]:
    """The cost of each equation of a loop."""
    inside = set(loop)
    made = {v for node in loop for v in node.outs if not _is_reduction(node)}
    read = set[int]()
    moved, work = dict[Node, float](), dict[Node, float]()
    for node in loop:
        size = 0
        for v in node.ins:
            if v not in made and v not in read:
                read.add(v)
                # For its gradient it is read again, and the gradient is written.
                size += _read(known, node, v) * (3 if v in known.with_gradient else 1)
        for v in node.outs:
            readers = known.readers.get(v, ())
            if _is_reduction(node) or not readers or not inside.issuperset(readers):
                # Its gradient is read.
                size += known.bytes[v] * (2 if v in known.with_gradient else 1)
        moved[node] = known.machine.flops_per_byte * size
        work[node] = flops(node) * (3 if known.has_gradient(node) else 1)
    return moved if sum(moved.values()) >= sum(work.values()) else work


def _read(known: _Values, node: Node, v: int) -> int:
    """The bytes of a value that an equation reads."""
    if node.name in _PARTS:
        return min(known.bytes[v], sum(known.bytes[out] for out in node.outs))
    return known.bytes[v]


# --- all others ---


def _alone(known: _Values, node: Node) -> float:
    """The cost of an equation that is not fused."""
    if node.name in _PRODUCTS:
        return _product(known, node)
    if node.bodies and node.name != "pallas_call":
        return _of_bodies(known, node)
    made = sum(known.bytes[v] for v in node.outs)
    moved = made + sum(_read(known, node, v) for v in node.ins)
    work = flops(node)
    if known.has_gradient(node):
        # The gradient of what is read has its size, also where little of it is read: a
        # lookup of some words has the gradient of the table.
        gradients = {v for v in node.ins if v in known.with_gradient}
        moved += made + sum(known.bytes[v] for v in gradients)
        work *= 3
    return max(work, known.machine.flops_per_byte * moved)


def _product(known: _Values, node: Node) -> float:
    """The cost of a matrix product or a convolution, and of those of its gradients."""
    left, right = node.ins[:2]
    (made,) = node.outs
    a, b, y = (known.bytes[v] for v in (left, right, made))
    a_read, y_read = a, y
    if node.name == "conv_general_dilated":
        a_patches, y_patches = _patches(node)
        a_read = max(a, a_patches * known.machine.patches)
        y_read = max(y, y_patches * known.machine.patches)
    moved = [a_read + b + y]
    if left in known.with_gradient:
        moved.append(y_read + b + a)
    if right in known.with_gradient:
        moved.append(a_read + y + b)
    work, ratio = flops(node), known.machine.flops_per_byte
    return sum(max(work, ratio * size) for size in moved)


def _patches(node: Node) -> tuple[float, float]:
    """The bytes of a convolution's patches of its input, and of those of the gradient
    of its output, from which it makes the gradient of its input.
    """
    image, kernel = (atom.aval for atom in node.eqn.invars)
    (made,) = (atom.aval for atom in node.eqn.outvars)
    numbers: Any = node.eqn.params["dimension_numbers"]
    window = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    if window == 1:
        return 0.0, 0.0
    channels = made.shape[numbers.out_spec[1]]
    positions = math.prod(made.shape) / max(1, channels)
    each = positions * window * made.dtype.itemsize
    return each * image.shape[numbers.lhs_spec[1]], each * channels


def _of_bodies(known: _Values, node: Node) -> float:
    """The cost of a loop, a branch or a call, by what is in it."""
    parts = []
    for body in node.bodies:
        trained = body.inputs if known.has_gradient(node) else ()
        inner = [v for v in trained if is_inexact(body.avals[v])]
        parts.append(sum(costs(body, body.nodes, inner, known.machine).values()))
    if node.name == "cond":
        return max(parts)
    again = RECOMPUTED if is_remat(node) and known.has_gradient(node) else 1
    return node.body_runs * sum(parts) * again
