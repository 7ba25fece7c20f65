"""Products whose result is transposed, and that run with their operands exchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fpipe
from fpipe._program.graph import evaluate, inline, trace
from fpipe._program.products import exchange_products
from fpipe._program.row_sums import find_row_sum, sum_rows_apart
from tests.helpers import assert_same, dense, mse

HIGH, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT


def arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def gradient(f):
    """The gradient of a function for its last argument, from a cotangent."""
    return lambda dy, *args: jax.vjp(lambda w: f(*args[:-1], w), args[-1])[1](dy)[0]


def rerun(f, *args):
    """The results of a function whose equations run with products exchanged, and the
    graph of what ran.
    """

    def run(*values):
        graph = inline(trace(lambda *own: jax.tree.leaves(f(*own)), *values))
        given = dict(zip(graph.inputs, values, strict=True))
        chosen = exchange_products(graph.nodes, graph.outputs)
        return evaluate(graph, graph.nodes, given, graph.outputs, chosen)

    return jax.jit(run)(*args), inline(trace(run, *args))


def found(graph, name):
    """All equations of a name, at any depth."""
    own = [node for node in graph.nodes if node.name == name]
    bodies = [body for node in graph.nodes for body in node.bodies]
    return own + [node for body in bodies for node in found(body, name)]


def product(dy, x):
    return jnp.dot(dy.T, x).T


def activated(dy, x):
    return jnp.tanh(product(dy, x))


def looped(dy, x):
    return jax.lax.scan(lambda h, _: (h + product(dy, x), None), x.T @ dy, None, 2)[0]


def until(dy, x):
    return jax.lax.while_loop(
        lambda h: h[0, 0] < 4, lambda h: abs(h + product(dy, x)) + 1, x.T @ dy
    )


def branched(dy, x):
    return jax.lax.cond(x[0, 0] > 9, lambda: x.T @ dy, lambda: product(dy, x))


def nested(dy, x):
    return jax.lax.cond(x[0, 0] > 9, lambda: x.T @ dy, lambda: looped(dy, x))


@jax.custom_jvp
def ruled(dy, x):
    return product(dy, x)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), ruled(*tangents)))

# Functions of `x` and weights; the shapes of a cotangent, of `x` and of the weights.
GRADIENTS = {
    "a dense layer": (lambda x, w: x @ w, (6, 5), (6, 4), (4, 5)),
    "of tokens": (lambda x, w: x @ w, (2, 3, 5), (2, 3, 4), (4, 5)),
    "of heads": (
        lambda x, w: jnp.einsum("btd,dhk->bthk", x, w),
        (2, 3, 2, 5),
        (2, 3, 4),
        (4, 2, 5),
    ),
    "of experts": (
        lambda x, w: jnp.einsum("ebd,edf->ebf", x, w),
        (3, 6, 5),
        (3, 6, 4),
        (3, 4, 5),
    ),
}
# Functions with a product inside of another equation.
INSIDE = {
    "scan": looped,
    "while": until,
    "cond": branched,
    "scan in cond": nested,
    "remat": jax.checkpoint(activated),
    "custom_jvp_call": ruled,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_weight_gradients_are_made_without_a_transpose(name):
    f, *shapes = GRADIENTS[name]
    args = arrays(*shapes)
    whole = gradient(f)
    before = inline(trace(lambda *own: [whole(*own)], *args))
    assert len(found(before, "transpose")) == 1
    got, graph = rerun(whole, *args)
    assert not found(graph, "transpose")
    *_, made = found(graph, "dot_general")  # after that of the forward
    assert graph.avals[made.ins[0]].shape == shapes[1]
    assert_same(got, [whole(*args)])


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_of_others_is_exchanged_too(name):
    dy, x = arrays((6, 5), (6, 4))
    f = INSIDE[name]

    def graph_of(run):
        return inline(trace(lambda *own: [run(*own)], dy, x))

    def exchanges(graph):
        """The products of `dy` on the left."""
        return [
            node
            for node in found(graph, "dot_general")
            if node.eqn.outvars[0].aval.shape == (5, 4)
        ]

    assert exchanges(graph_of(f))
    got, graph = rerun(f, dy, x)
    assert not exchanges(graph)
    assert_same(got, [f(dy, x)])


def test_a_product_keeps_its_types_and_its_precisions():
    dy, x = arrays((6, 5), (6, 4), dtype=jnp.bfloat16)

    def f(dy, x):
        made = jax.lax.dot_general(
            dy,
            x,
            (((0,), (0,)), ((), ())),
            precision=(HIGH, DEFAULT),
            preferred_element_type=jnp.float32,
        )
        return made.T

    got, graph = rerun(f, dy, x)
    (made,) = found(graph, "dot_general")
    assert made.eqn.params["precision"] == (DEFAULT, HIGH)
    assert got[0].dtype == jnp.float32
    assert_same(got, [f(dy, x)])


def larger(dy, x):
    return jnp.dot(dy.T, jnp.concatenate([x, x], axis=1)).T


def read_twice(dy, x):
    made = jnp.dot(dy.T, x)
    return made.T, made.sum(0)


def also_returned(dy, x):
    made = jnp.dot(dy.T, x)
    return made.T, made


def other_order(dy, x):
    return jnp.einsum("ri,rj->ij", dy, x)[:, :, None].transpose(2, 1, 0)


def with_algorithm(dy, x):
    made = jax.lax.dot_general(
        dy,
        x,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.DotAlgorithmPreset.F32_F32_F32,
    )
    return made.T


def with_python(dy, x):
    def body(h, _):
        jax.debug.callback(lambda a: None, h[0, 0])
        return h + product(dy, x), None

    return jax.lax.scan(body, x.T @ dy, None, length=2)[0]


@pytest.mark.parametrize(
    "f",
    [larger, read_twice, also_returned, other_order, with_algorithm, with_python],
)
def test_what_is_left_as_it_is(f):
    dy, x = arrays((6, 5), (6, 4))
    before = inline(trace(lambda *own: jax.tree.leaves(f(*own)), dy, x))
    got, graph = rerun(f, dy, x)
    for name in ("transpose", "dot_general"):
        shapes = [
            [[v.aval.shape for v in node.eqn.outvars] for node in found(each, name)]
            for each in (before, graph)
        ]
        assert shapes[0] == shapes[1]
    assert found(graph, "transpose")
    assert_same(got, jax.tree.leaves(f(dy, x)))


def test_a_checkpoint_of_a_forward_has_no_barrier():
    dy, x = arrays((6, 5), (6, 4))
    layer = jax.checkpoint(activated)

    def backward(dy, x):
        return jax.grad(lambda x: (layer(dy, x) ** 2).sum())(x)

    _, forward = rerun(layer, dy, x)
    assert not found(forward, "optimization_barrier")
    got, graph = rerun(backward, dy, x)
    assert len(found(graph, "optimization_barrier")) == 1
    assert_same(got, [backward(dy, x)])


@pytest.mark.parametrize("transposes", [0, 1, 2])
def test_sums_over_rows_are_made_without_a_transpose(transposes):
    # Two transposes are none, and the product is not exchanged for both of them.
    dy, x = arrays((8, 5), (8, 4))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def f(dy, x):
        made = jnp.einsum("ri,rj->ij", dy, x)
        for _ in range(transposes):
            made = jax.lax.transpose_p.bind(made, permutation=(1, 0))
        return 2.0 * made

    graph = inline(trace(lambda *own: [f(*own)], dy, x))
    (value,) = graph.outputs
    row_sum = find_row_sum(graph, graph.nodes, value, rows=8, parts=4)
    assert row_sum is not None

    def parts(dy, x):
        values = dict(graph.consts) | dict(zip(graph.inputs, (dy, x), strict=True))
        return [sum_rows_apart(row_sum, values, "data", mesh)]

    left = found(inline(trace(parts, dy, x)), "transpose")
    assert len(left) == (1 if transposes == 2 else 0)
    (got,) = jax.jit(parts)(dy, x)
    want = jnp.stack([f(dy[n : n + 2], x[n : n + 2]) for n in range(0, 8, 2)])
    assert_same(got, want)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_a_pipe_transposes_no_weight_gradient(checkpoint):
    layers = [dense(4, jnp.tanh)] * 2
    x, t = arrays((8, 4), (8, 4))
    pipe = fpipe.Pipe(layers, [1, 1], chunks=2, checkpoint=checkpoint, executor="scan")
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(mse)
    closed = jax.make_jaxpr(step)(params, x, t)
    plain = jax.make_jaxpr(fpipe.sequential(layers, 2).value_and_grad(mse))(
        pipe.gather(params), x, t
    )
    assert "transpose[" in str(plain)
    assert "transpose[" not in str(closed)
