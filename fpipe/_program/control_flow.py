"""What goes on inside of equations: loops, branches and recomputations.

A `scan`, a `while`, a `cond` and a `jax.checkpoint` are one equation each, and hide
what is in them. In: equations. Out: answers that look inside, at any depth. For

    y = jax.lax.scan(body, h, xs)       with a `jax.pure_callback` in the body

    is_remat       False
    has_loop       True
    asks_host      True
    scan_parts     (0, 1): no constants, one array in the carry
"""

from collections.abc import Iterable, Sequence

from fpipe._program.graph import Graph, Node, inline


def is_remat(node: Node) -> bool:
    """Whether an equation is a `jax.checkpoint`, whatever this release calls it."""
    # The primitive has had several names; its parameters have kept theirs.
    return {"jaxpr", "policy", "prevent_cse"} <= node.eqn.params.keys()


def calls_host(nodes: Iterable[Node]) -> bool:
    """Whether an equation calls Python while it runs."""
    return any(
        "callback" in node.name
        or node.name == "debug_print"
        or any(calls_host(body.nodes) for body in node.bodies)
        for node in nodes
    )


def asks_host(nodes: Iterable[Node]) -> bool:
    """Whether an equation calls Python and takes what it returns: a `pure_callback` or
    an `io_callback`, and not a `jax.debug.print`.
    """
    return any(
        node.name in ("pure_callback", "io_callback")
        or any(asks_host(body.nodes) for body in node.bodies)
        for node in nodes
    )


def runs_on_anything(nodes: Iterable[Node]) -> bool:
    """Whether equations may run on numbers that mean nothing: they end, run the same
    equations whatever they get, and do nothing but make numbers.
    """
    return not any(
        "callback" in node.name
        or node.name in ("debug_print", "while", "cond")
        or not all(runs_on_anything(body.nodes) for body in node.bodies)
        for node in nodes
    )


def has_own_devices(nodes: Iterable[Node]) -> bool:
    """Whether an equation says what each device does: a `shard_map`, or Python that is
    called.
    """
    return calls_host(nodes) or any(
        node.name == "shard_map"
        or any(has_own_devices(body.nodes) for body in node.bodies)
        for node in nodes
    )


def has_loop(node: Node) -> bool:
    """Whether an equation is a loop, or has one in it."""
    return node.name in ("scan", "while") or any(
        has_loop(inner) for body in node.bodies for inner in body.nodes
    )


def scan_parts(node: Node) -> tuple[int, int]:
    """How many of the first operands of a `scan` are constants, and how many after
    them its carry.
    """
    # The names of a scan's parameters are not stable, so its operands are told apart by
    # their shapes: what is scanned over, or stacked, has one axis more outside than
    # inside:
    #
    #     operands   constants: as many   carry: as many   scanned over: one more
    #     results                         carry: as many   stacked: one more
    (body,) = node.bodies
    outside = [v.aval.ndim for v in (*node.eqn.invars, *node.eqn.outvars)]
    inside = [body.avals[v].ndim for v in (*body.inputs, *body.outputs)]
    whole = [a == b for a, b in zip(outside, inside, strict=True)]
    carried = sum(whole[len(node.ins) :])
    return sum(whole[: len(node.ins)]) - carried, carried


def while_body(node: Node) -> tuple[Graph, tuple[int, ...]]:
    """The body of a `while`, and the operands that are its inputs: its constants, and
    the carry.
    """
    # Before them come the constants of the condition.
    body = inline(node.eqn.params["body_jaxpr"])
    return body, node.ins[len(node.ins) - len(body.inputs) :]


def content_dependents(nodes: Iterable[Node], values: Iterable[int]) -> set[int]:
    """The values whose content depends on some values, themselves included.

    `dependents`, but seen through control flow. In

        def body(h, w):
            w16 = w.astype(jnp.bfloat16)
            return jnp.tanh(h @ w16), w16

        h, w16s = jax.lax.scan(body, x, ws)

    `w16s` is a result of the same equation as `h`, and still only a copy of the
    weights: it does not depend on `x`. The value that chooses a branch does not count
    either: weights that a `cond` passes through are weights, whatever chooses the
    branch.
    """
    found = set(values)
    for node in nodes:
        if not node.bodies:
            if not found.isdisjoint(node.ins):
                found.update(node.outs)
            continue
        depends = [v in found for v in node.ins]
        if any(depends):
            results = _through(node, depends)
            found.update(v for v, yes in zip(node.outs, results, strict=True) if yes)
    return found


def _through(node: Node, depends: Sequence[bool]) -> list[bool]:
    """Which results of an equation depend, from which of its operands do."""
    if node.name == "cond":
        # The first operand is the number of the branch.
        branches = [_through_body(body, depends[1:]) for body in node.bodies]
        return [any(results) for results in zip(*branches, strict=True)]
    if node.name == "scan":
        constants, carried = scan_parts(node)
        return _through_loop(node.bodies[0], depends, constants, carried)
    if node.name == "while":
        body, ins = while_body(node)
        carried = len(node.outs)
        constants = len(ins) - carried
        return _through_loop(body, depends[-len(ins) :], constants, carried)
    if is_remat(node):
        return _through_body(node.bodies[0], depends)
    # All results of a foreign call count as dependent: a missing warning is better than
    # a wrong one.
    return [True] * len(node.outs)


def _through_body(body: Graph, depends: Sequence[bool]) -> list[bool]:
    """Which results of a loop's body, or of a branch, depend."""
    values = [v for v, yes in zip(body.inputs, depends, strict=True) if yes]
    found = content_dependents(body.nodes, values)
    return [v in found for v in body.outputs]


def _through_loop(
    body: Graph, depends: Sequence[bool], constants: int, carried: int
) -> list[bool]:
    """Which results of a loop depend: round after round, until no more of the carry
    does.

    What depends in one round may reach another part of the carry in the next, as in
    `(a, b) -> (x, a)`: after one round `a` depends on `x`, after two `b` does. Each
    round but the last adds to the carry, so there are at most as many as it has parts.
    """
    depends = list(depends)
    while True:
        results = _through_body(body, depends)
        carry = depends[constants : constants + carried]
        grown = [a or b for a, b in zip(carry, results, strict=False)]
        if grown == carry:
            return results
        depends[constants : constants + carried] = grown
