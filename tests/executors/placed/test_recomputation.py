"""Recomputation, counted from what runs: matrix products in the compiled programs, and
calls back to the host.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import fpipe
from tests.executors.helpers import products
from tests.helpers import noise

M = 4
W = 8


def two_products():
    """`tanh(x @ a) @ b`: forward 2, backward 4, or 3 without an input gradient."""

    def init(key, x):
        a, b = jax.random.split(key)
        return noise(a, (W, W)), noise(b, (W, W))

    return fpipe.Layer(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], init)


# Per microbatch: stage 0 has no input gradient to compute (3), stage 1 has (4).
# Recomputing costs stage 0 the product in front of the tanh (1), the second one's
# result is not needed; stage 1 both (2), for the loss squares it. Stage 0 waits for
# its cotangents, and recomputes in `R`. Stage 1 waits for none.
@pytest.mark.parametrize(
    ("checkpoint", "again"),
    [
        ("never", 0),
        ("always", M),
        ("except_last", M - 1),
        (jax.checkpoint_policies.everything_saveable, 0),
        (jax.checkpoint_policies.nothing_saveable, M),
        (jax.checkpoint_policies.dots_saveable, 0),
    ],
    ids=["never", "always", "except_last", "everything", "nothing", "dots"],
)
def test_matrix_products(checkpoint, again):
    counts = products([two_products()] * 2, checkpoint)
    assert counts == Counter(
        {
            ("F", 0): 2 * M,
            ("F", 1): 2 * M,
            ("R", 0): again,
            ("B", 0): 3 * M,
            ("B", 1): 4 * M + 2 * again,
        }
    )


def test_where_backward_follows_forward_always_recomputes_nothing():
    counts = products([two_products()] * 2, "always", schedule="1f1b")
    assert counts[("B", 1)] == 4 * M
    assert (counts[("R", 0)], counts[("R", 1)]) == (M, 0)
    assert counts[("B", 0)] == 3 * M


def test_the_last_microbatch_is_the_last_that_was_made():
    """5 rows with `chunks=4` make 3 microbatches (2, 2, 1): the third keeps its
    residuals.
    """
    hits = []

    def layer(p, x):
        jax.debug.callback(lambda: hits.append(1))
        return jnp.sin(x @ p)

    layers = [fpipe.Layer(layer)] * 2
    for checkpoint, expected in (
        ("never", 6),
        ("except_last", 6 + 2 + 2),
        ("always", 6 + 3 + 3),
    ):
        pipe = fpipe.Pipe(
            layers, [1, 1], chunks=4, checkpoint=checkpoint, schedule="gpipe"
        )
        params = pipe.place((jnp.eye(4), jnp.eye(4)))
        hits.clear()
        jax.block_until_ready(pipe.value_and_grad(jnp.mean)(params, jnp.ones((5, 4))))
        jax.effects_barrier()
        assert len(hits) == expected, checkpoint


@pytest.mark.quick
def test_what_is_not_asked_for_is_not_computed():
    layers = [two_products()] * 2
    # Only x: no weight gradients, 2 products per backward.
    counts = products(layers, "never", wrt=1)
    assert counts == {
        ("F", 0): 2 * M,
        ("F", 1): 2 * M,
        ("B", 0): 2 * M,
        ("B", 1): 2 * M,
    }


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_parameters_under_stop_gradient_cost_no_weight_gradient(checkpoint):
    frozen = fpipe.Layer(
        lambda p, x: jnp.tanh(x @ jax.lax.stop_gradient(p)), lambda key, x: jnp.eye(W)
    )
    trained = fpipe.Layer(lambda p, x: jnp.tanh(x @ p), lambda key, x: jnp.eye(W))
    counts = products(
        [trained, frozen, trained], checkpoint, schedule="1f1b", balance=(1, 1, 1)
    )
    again = M if checkpoint == "always" else 0
    assert counts[("B", 1)] == M  # the input gradient alone
    assert counts[("R", 1)] == again
    # In front, nothing needs a gradient at all: no backward runs there.
    counts = products([frozen, trained], checkpoint, schedule="1f1b", balance=(1, 1))
    assert counts == {("F", 0): M, ("F", 1): M, ("B", 1): M}


def test_a_named_policy_saves_what_it_names():
    def layer(p, x):
        return jnp.tanh(jnp.tanh(checkpoint_name(x @ p[0], "kept")) @ p[1]) @ p[0]

    layers = [fpipe.Layer(layer, two_products().init)] * 2
    policies = jax.checkpoint_policies
    counts = {}
    for name, policy in {
        "nothing": policies.nothing_saveable,
        "kept": policies.save_only_these_names("kept"),
        "dots": policies.dots_saveable,
    }.items():
        found = products(layers, policy)
        counts[name] = found[("R", 0)] + found[("B", 0)]
    assert counts["dots"] == counts["kept"] - M == counts["nothing"] - 2 * M
