"""Loops over stacked layers: cut by rounds, their parameters by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fpipe
from tests.helpers import assert_same
from tests.split.models import scanned, weights
from tests.split.test_cuts import owned

W = 3
X = weights(4, W)
STACK = {"w": weights(4, W, W), "b": weights(4, W, seed=1)}


def layer(h, p):
    return jnp.tanh(h @ p["w"] + p["b"])


def scan_of(params, x):
    return jax.lax.scan(lambda h, p: (layer(h, p), None), x, params)[0]


def loss(y):
    return jnp.mean(y**2)


def same_as_function(fn, params, x, split, limit=1e-5):
    """The pieces, one after the other, compute what the function computes; gradients
    too.
    """
    run = fpipe.sequential(split.layers)

    def of_pieces(params):
        y = run(split.params(params), x)
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(y)), y

    def of_function(params):
        y = fn(params, x)
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(y)), y

    got, want = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(params)
        for f in (of_pieces, of_function)
    )
    assert_same(got, want, limit)


# --- where it is cut ---


def test_by_itself_a_loop_is_cut_after_every_round():
    """And not in a round, where as few bytes go over after its first operation."""

    def fn(params, x):
        def body(h, p):
            return jnp.sin(h) @ p["w"] + p["b"], None

        return jax.lax.scan(body, x, params)[0]

    split = fpipe.split(fn, STACK, X)
    assert owned(split) == [[f"b[{r}]", f"w[{r}]"] for r in range(4)]
    trace = split.cut.trace(split.cut.first)
    names = {tuple(node.name for node in piece.nodes) for piece in trace.pieces}
    assert len(names) == 1
    assert [len(found) for found in trace.boundaries] == [1, 1, 1]
    assert not any(layer.borrow or layer.pop for layer in split.layers)


def test_rows_that_follow_each_other_are_one_array():
    split = fpipe.split(scan_of, STACK, X, stages=2)
    assert owned(split) == [["b[0:2]", "w[0:2]"], ["b[2:4]", "w[2:4]"]]
    shapes = jax.tree.map(jnp.shape, split.params(STACK))
    assert shapes == (((2, W), (2, W, W)),) * 2


def test_a_path_may_end_with_a_row():
    def fn(params, x):
        return scan_of(params["h"], x)

    split = fpipe.split(fn, {"h": STACK}, X, cuts=["h/3", "h/w/1"])
    assert owned(split) == [
        ["h/b[0]", "h/w[0]"],
        ["h/b[1:3]", "h/w[1:3]"],
        ["h/b[3]", "h/w[3]"],
    ]
    with pytest.raises(ValueError, match=r"cuts=\['h/4'\].*there is none"):
        fpipe.split(fn, {"h": STACK}, X, cuts=["h/4"])


def test_a_loop_over_time_stays_one_operation():
    """It reads its weights in every round, and a table by rows."""

    def rnn(params, x):
        w = params["w"][0]

        def cell(h, at):
            a, place = at
            return jnp.tanh(h @ w + a + place), h

        h = jax.lax.scan(cell, x[:, 0], (x.swapaxes(0, 1), params["b"]))[0]
        return h @ params["w"][1]

    x = weights(2, 4, W)
    split = fpipe.split(rnn, STACK, x, cuts=["w/1"])
    names = [node.name for node in split.cut.trace(split.cut.first).pieces[0].nodes]
    assert "scan" in names
    same_as_function(rnn, STACK, x, split)


def reverse_with_results(params, x):
    """From the last layer to the first, in a jitted function; what each layer gets
    besides is of the data, of its row, and of the loop's constants. A result that
    nobody reads is of integers.
    """

    @jax.jit
    def run(params, x):
        def body(carry, row):
            h, total = carry
            p, own, n = row
            h = layer(h, p) + own * x
            return (h, total + n), {"h": h, "n": total}

        rows = (params, jnp.stack([x, -x, x, 2 * x]), jnp.arange(4))
        start = (x, jnp.zeros((), int))
        return jax.lax.scan(body, start, rows, reverse=True, unroll=2)

    (h, _), made = run(params, x)
    return h, made["h"].swapaxes(0, 1)


def stacked_inside(params, x):
    """Layers that the function itself stacks, after a cast."""
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *cast)
    return scan_of(stack, x.astype(jnp.bfloat16)).astype(jnp.float32)


def by_index(params, x):
    """Rows that are taken one by one, in all the ways to write that."""
    half = jax.tree.map(lambda a: 0.5 * a, params)
    x = layer(x, jax.tree.map(lambda a: a[0], half))
    x = layer(x, jax.tree.map(lambda a: a[jnp.int32(1)], half))
    take = lambda a: jax.lax.dynamic_index_in_dim(a, 2, keepdims=False)  # noqa: E731
    x = layer(x, jax.tree.map(take, params))
    return layer(x, jax.tree.map(lambda a: jnp.take(a, -1, axis=0), params))


def last_layer_first(params, x):
    """A loop over rows in the other order, after a cast."""
    return scan_of(jax.tree.map(lambda a: (0.5 * a)[::-1], params), x)


def counted_loop(params, x):
    """Layers by the number of the round."""

    def body(i, h):
        return layer(h, jax.tree.map(lambda a: a[i], params))

    return jax.lax.fori_loop(0, 4, body, x)


def numbered(params, x):
    """Rounds that compute with their number."""

    def body(i, h):
        return layer(h, jax.tree.map(lambda a: a[i], params)) * (1.0 + 0.5 * i)

    return jax.lax.fori_loop(0, 4, body, x)


def checkpointed_numbers(params, x):
    """The same from a list of numbers, each layer checkpointed."""

    @jax.checkpoint
    def block(h, i, stack):
        take = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)  # noqa: E731
        return layer(h, jax.tree.map(take, stack))

    numbers = jnp.array([2, 0, 3, 1])
    return jax.lax.scan(lambda h, i: (block(h, i, params), None), x, numbers)[0]


def on_another_axis(params, x):
    """Layers that are stacked on the second axis of the weights."""
    rows = {"b": params["b"], "w": jnp.moveaxis(params["w"], 1, 0)}
    return scan_of(rows, x)


def by_index_on_another_axis(params, x):
    def body(i, h):
        return layer(h, {"w": jnp.take(params["w"], i, 1), "b": params["b"][i]})

    return jax.lax.fori_loop(0, 4, body, x)


def by_number_on_another_axis(params, x):
    for n in (2, 0, 3, 1):
        x = layer(x, {"w": params["w"][:, n], "b": params["b"][n]})
    return x


def in_groups(params, x):
    """Two layers in a round, by another form of the stack."""
    groups = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), params)
    return jax.lax.scan(lambda h, g: (scan_of(g, h), None), x, groups)[0]


LAYERS = [jax.tree.map(lambda a, n=n: a[n], STACK) for n in range(4)]
ON_AXIS_1 = STACK | {"w": STACK["w"].swapaxes(0, 1)}
GROUPED = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), STACK)
LOOPS = {
    "reverse": (reverse_with_results, STACK, 3, {"b": 4, "w": 4}),
    "nested": (
        lambda params, x: jax.lax.scan(lambda h, g: (scan_of(g, h), None), x, params)[
            0
        ],
        GROUPED,
        2,
        {"b": 2, "w": 2},
    ),
    "stacked inside": (stacked_inside, LAYERS, 4, {}),
    "by index": (by_index, STACK, 4, {"b": 4, "w": 4}),
    "last layer first": (last_layer_first, STACK, 4, {"b": 4, "w": 4}),
    "counted": (counted_loop, STACK, 4, {"b": 4, "w": 4}),
    "numbered": (numbered, STACK, 4, {"b": 4, "w": 4}),
    "numbers": (checkpointed_numbers, STACK, 4, {"b": 4, "w": 4}),
    "another axis": (on_another_axis, ON_AXIS_1, 4, {"b": 4, "w": 4}),
    "index of axis": (by_index_on_another_axis, ON_AXIS_1, 4, {"b": 4, "w": 4}),
    "number of axis": (by_number_on_another_axis, ON_AXIS_1, 4, {"b": 4, "w": 4}),
    "groups": (in_groups, STACK, 4, {"b": 4, "w": 4}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_rows_are_owned_by_the_pieces_that_read_them(name):
    fn, params, stages, rows = LOOPS[name]
    split = fpipe.split(fn, params, X, stages=stages)
    assert not any(layer.borrow for layer in split.layers)
    found = [sum(r.leaf == n for r in split.cut.roots) for n in range(len(rows))]
    assert found == list(rows.values())
    same_as_function(fn, params, X, split, 2e-2 if name == "stacked inside" else 1e-5)


def test_a_stack_that_is_read_as_a_whole_too():
    def fn(params, x):
        return scan_of(params, x) * jnp.sum(params["w"] ** 2)

    split = fpipe.split(fn, STACK, X, stages=2)
    assert owned(split)[0] == ["b[0:2]", "w[0:2]"]
    assert [len(layer.borrow) for layer in split.layers] == [0, 1]
    same_as_function(fn, STACK, X, split)


# --- marks ---


def test_a_mark_in_a_loop_marks_what_its_body_returns():
    def ends(params, x):
        def body(h, p):
            return fpipe.cut(layer(h, p), "block"), jnp.sum(h, 1)

        h, sums = jax.lax.scan(body, x, params)
        return h, sums.T

    split = fpipe.split(ends, STACK, X)
    assert [layer.name for layer in split.layers[1:]] == ["block"] * 4
    assert owned(split) == [*([f"b[{r}]", f"w[{r}]"] for r in range(4)), []]
    same_as_function(ends, STACK, X, split)

    def middle(params, x):
        def body(h, p):
            return jnp.sin(fpipe.cut(layer(h, p))), None

        return jax.lax.scan(body, x, params)[0]

    with pytest.raises(ValueError, match="in the middle of a round of a `scan`"):
        fpipe.split(middle, STACK, X)


# --- the user's tree ---


@pytest.mark.quick
@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_placed_rows_are_one_node_and_gathered_exactly(executor):
    split = fpipe.split(scan_of, STACK, X[:2], stages=2)
    devices = jax.devices()[:2]
    pipe = fpipe.Pipe(split, devices=devices, chunks=2, executor=executor)
    placed = pipe.place(STACK)
    assert_same(pipe.gather(placed), STACK)
    if executor == "placed":
        assert [block.devices() for block in placed["w"].blocks] == [
            {device} for device in devices
        ]
        assert (placed["w"].shape, placed["w"].dtype) == ((4, W, W), jnp.float32)
    value, grads = pipe.value_and_grad(loss)(placed, X)
    assert jax.tree.structure(grads) == jax.tree.structure(placed)
    want = jax.jit(jax.value_and_grad(lambda p: loss(scan_of(p, X))))(STACK)
    assert_same((value, pipe.gather(grads)), want)
    # Number by number, an optimizer does not notice.
    tx = optax.rmsprop(0.1, momentum=0.9)
    updates, _ = tx.update(grads, tx.init(placed))
    new = pipe.gather(optax.apply_updates(placed, updates))
    updates, _ = tx.update(want[1], tx.init(STACK))
    assert_same(new, optax.apply_updates(STACK, updates))


def test_frozen_rows_go_by_the_path_of_their_leaf():
    split = fpipe.split(scan_of, STACK, X[:2], stages=2)
    pipe = fpipe.Pipe(split, devices=jax.devices()[:2], chunks=2)
    step = pipe.value_and_grad(jnp.sum, frozen=lambda path, a: path == "b")
    _, grads = step(pipe.place(STACK), X)
    assert grads["b"].dtype == jax.dtypes.float0
    assert pipe.gather(grads)["b"].shape == (4, W)
    assert grads["w"].dtype == jnp.float32


# --- checkpoints ---


def count_remats(split):
    """How many checkpointed functions each piece has."""
    found, x = [], X
    for one, params in zip(split.layers, split.params(split.param_shapes), strict=True):
        jaxpr = jax.make_jaxpr(one.apply)(params, x)
        x = jax.eval_shape(one.apply, params, x)
        found.append(sum(eqn.primitive.name == "remat2" for eqn in jaxpr.eqns))
    return found


def test_a_checkpoint_of_the_whole_model_is_cut_in_two():
    policy = jax.checkpoint_policies.dots_saveable

    def whole(params, x):
        return jax.checkpoint(scan_of, policy=policy)(params, x) * 2.0

    split = fpipe.split(whole, STACK, X, stages=2)
    assert owned(split) == [["b[0:2]", "w[0:2]"], ["b[2:4]", "w[2:4]"]]
    assert count_remats(split) == [1, 1]
    around = split.cut.trace(split.cut.first).traced.checkpoints
    assert {one.policy for inside in around.values() for one in inside} == {policy}
    same_as_function(whole, STACK, X, split)


def test_a_mark_cuts_a_checkpoint_in_a_checkpoint():
    def fn(params, x):
        @jax.checkpoint
        def inner(h):
            return fpipe.cut(layer(h, LAYERS[0])) @ params["w"][0]

        @jax.checkpoint
        def outer(h):
            return jnp.sin(inner(jnp.sin(h)) @ params["w"][1])

        return outer(x)

    params = {"w": STACK["w"][:2]}
    split = fpipe.split(fn, params, X)
    assert count_remats(split) == [1, 1]
    same_as_function(fn, params, X, split)


def test_a_checkpoint_of_a_layer_is_kept():
    """The body of a loop that is checkpointed, as everybody writes it in a loop."""

    def fn(params, x):
        block = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(lambda h, p: (block(h, p), None), x, params)[0]

    split = fpipe.split(fn, STACK, X)
    assert count_remats(split) == [1] * 4
    # Out of its loop nothing else keeps XLA from finding the forward's again.
    trace = split.cut.trace(split.cut.first)
    remats = [n for n in trace.traced.graph.nodes if n.name == "remat2"]
    assert all(node.eqn.params["prevent_cse"] for node in remats)


def test_evaluation_and_other_shapes_are_cut_at_the_same_rounds():
    example = scanned()
    split = example.split(cuts=["blocks/2"])
    run = fpipe.sequential(split.layers)
    y = jax.jit(lambda p: run(split.params(p), example.x))(example.params)
    assert_same(y, jax.jit(example.fn)(example.params, example.x))


def test_as_many_programs_as_layers_by_hand():
    split = fpipe.split(scan_of, STACK, X[:2])
    programs = []
    for layers, params in ((split, STACK), ([lambda p, x: layer(x, p)] * 4, LAYERS)):
        devices = [jax.devices()[0]] * 4
        pipe = fpipe.Pipe(layers, devices=devices, chunks=2)
        programs.append(pipe.compile(pipe.place(params), X, loss_fn=loss))
    assert programs[0] == programs[1]


def test_equal_rounds_are_one_core_under_scan():
    split = fpipe.split(scan_of, STACK, X[:2])
    pipe = fpipe.Pipe(split, devices=jax.devices()[:2], chunks=2, executor="scan")
    shapes = sorted(a.shape for a in jax.tree.leaves(pipe.place(STACK)))
    # Two blocks of one row on each device, without padding.
    assert shapes == [(2, 1, W), (2, 1, W), (2, 1, W, W), (2, 1, W, W)]
    assert np.prod(shapes[0]) == 2 * W
