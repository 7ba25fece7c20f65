"""A stage is split as the modules draw it."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float

from fpipe._core.pytrees import Shape
from fpipe._model.model import Model
from fpipe._model.remat import Remat
from fpipe._model.stages import Port, X, cut_stages
from fpipe._program.remats import inline_remats
from fpipe._program.stage_programs import SplitSpec, split_stage
from fpipe._program.trace import differentiate, trace_stage
from tests.helpers import shaped

W = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def joint_of(layer, params, remat=None):
    """The joint graph of a stage in the middle, all its gradients asked for."""
    model = Model([lambda p, x: x, layer, lambda p, x: x])
    stage = cut_stages(model, [1, 1, 1])[1]
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    given = {Port("params", 1): Shape.of(params), X: Shape.of(x)}
    flat = trace_stage(stage, given, loss=None, whole=frozenset(), where="")
    return differentiate(flat, frozenset(flat.inputs), remat, where="")


def table_of(joint, split_backward):
    """For each kind what its program takes, returns, and runs."""
    counts = tuple((leaf, 1) for leaf in joint.cotangents)
    spec = SplitSpec(1, counts, split_backward=split_backward, accumulate=True)
    return {
        kind: (
            " ".join(str(name) for name in program.ins),
            " ".join(str(name) for name in program.outs),
            " ".join(node.name for node in program.code.nodes) if program.code else "",
        )
        for kind, program in split_stage(joint, spec).by_kind.items()
    }


# Releases of JAX spell the derivative of `jnp.tanh` in different equations. Its own
# rule makes the drawings below hold for all of them.
@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


@tanh.defjvp
def tanh_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = jnp.tanh(x)
    return y, tangent - tangent * y * y


@shaped
def dense(
    w: Float[Array, "in out"], x: Float[Array, "rows in"]
) -> Float[Array, "rows out"]:
    return tanh(x @ w)


def test_forward_and_backward():
    assert table_of(joint_of(dense, W), split_backward=False) == {
        "F": ("params 1[0] x[0]", "y[0]", "dot_general tanh"),
        "B": (
            "params 1[0] x[0] cotangent y[0] y[0] sum params 1[0]",
            "gradient x[0] sum params 1[0]",
            "neg mul mul add_any dot_general transpose dot_general",
        ),
    }


def test_a_backward_in_halves():
    table = table_of(joint_of(dense, W), split_backward=True)
    assert (table["I"], table["W"]) == (
        (
            "params 1[0] cotangent y[0] y[0]",
            "gradient x[0] handed 0",
            "neg mul mul add_any dot_general",
        ),
        ("x[0] handed 0 sum params 1[0]", "sum params 1[0]", "dot_general transpose"),
    )


def test_what_is_made_from_parameters_is_made_again():
    """`w'` and `r` of the drawing in `fpipe._program.residuals`."""

    def layer(w, x):
        return tanh(x @ w.astype(jnp.float32))

    half = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
    taken, _, nodes = table_of(joint_of(layer, half), split_backward=False)["B"]
    assert taken == "params 1[0] x[0] cotangent y[0] y[0] sum params 1[0]"
    assert nodes.split()[:2] == ["convert_element_type", "neg"]


def test_what_has_no_name_is_a_residual():
    table = table_of(joint_of(lambda w, x: jnp.cos(x @ w), W), split_backward=False)
    assert table["F"][1:] == ("y[0] residual 0", "dot_general cos sin")
    assert "residual 0" in table["B"][0]


def quadratic(x):
    """From JAX 0.12 on an equation of its own."""
    polynomial = getattr(jax.lax, "polynomial", None)
    return polynomial(x, [1.0, 2.0, 3.0]) if polynomial else 1.0 + x * (2.0 + 3.0 * x)


def test_a_polynomial_is_made_again():
    joint = joint_of(lambda w, x: quadratic(quadratic(x @ w)), W)
    table = table_of(joint, split_backward=False)
    assert table["F"][1] == "y[0] residual 0"


def test_a_recomputation_is_inlined_after_barriers():
    """The drawing in `fpipe._program.remats`."""
    remat = Remat.of("always")
    joint = joint_of(lambda w, x: jnp.sin(x @ w), W, remat)
    backward = [n.name for n in joint.graph.nodes if n.name not in ("pjit", "jit")]
    assert backward.count("dot_general") == 1  # The forward's; the rest is in one.
    nodes = [n for n in inline_remats(joint).graph.nodes if n.recomputes]
    assert [node.name for node in nodes if node.name == "optimization_barrier"]
    assert [node.name for node in nodes].count("dot_general") == 3
    table = table_of(joint, split_backward=True)
    assert table["I"][2].split().count("dot_general") == 2
    assert table["W"][2].split().count("dot_general") == 1


@shaped
def scanned(
    ws: Float[Array, "layers width width"], x: Float[Array, "rows width"]
) -> Float[Array, "rows width"]:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def test_an_equation_that_gives_both_gradients_is_i_s():
    stacked = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    joint = joint_of(scanned, stacked)
    table = table_of(joint, split_backward=True)
    assert table.keys() == {"F", "I"}
    assert table["I"][1] == "gradient x[0] sum params 1[0]"
    counts = tuple((leaf, 1) for leaf in joint.cotangents)
    (warning,) = split_stage(joint, SplitSpec(1, counts, split_backward=True)).warnings
    assert warning.startswith("stage 1: I makes 1 of its 1 weight gradients")


@pytest.mark.parametrize("split_backward", [False, True])
def test_weights_that_control_flow_hides_are_warned_of(split_backward):
    def layer(ws, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)), None

        return jax.lax.scan(body, x, ws)[0]

    stacked = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    joint = joint_of(layer, stacked)
    counts = tuple((leaf, 1) for leaf in joint.cotangents)
    spec = SplitSpec(1, counts, split_backward=split_backward)
    warnings = split_stage(joint, spec).warnings
    kept = [w for w in warnings if "made from parameters alone inside a lax.scan" in w]
    assert len(kept) == 1
