"""Codes that leave on the device what they would move to the host."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import fpipe
from fpipe._core.pytrees import on_host
from fpipe._executors.placed.instructions import Run
from fpipe._program.host_memory import kept_on_device
from tests.executors.helpers import plan_of
from tests.helpers import assert_same, noise

POLICY = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["product"],
    offload_src="device",
    offload_dst="pinned_host",
)
DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
X = noise(jax.random.key(1), (4, 3))


def wave(w, x):
    return jnp.sin(checkpoint_name(x @ w, "product"))


def own(w, x):
    return jax.checkpoint(wave, policy=POLICY)(w, x)


def looped(w, x):
    return jax.lax.scan(lambda x, _: (own(w, x), None), x, None, length=2)[0]


def forward_of(layer, checkpoint):
    """The code of a stage's forward."""
    layer = fpipe.Layer(layer, lambda key, x: noise(key, (3, 3)))
    pipe = fpipe.Pipe(
        [layer] * 2, [1, 1], chunks=2, checkpoint=checkpoint, schedule="gpipe"
    )
    params = pipe.init(jax.random.key(0), X)
    pipe.compile(params, X, loss_fn=jnp.mean)
    plan = plan_of(pipe)
    first = next(item for item in plan.instructions if isinstance(item, Run))
    assert first.code is not None
    return first.code


def moves(nodes):
    """The equations that move something to the host, at any depth."""
    for node in nodes:
        if node.name == "device_put" and any(on_host(v.aval) for v in node.eqn.outvars):
            yield node
        for body in node.bodies:
            yield from moves(body.nodes)


@pytest.mark.parametrize(
    ("layer", "checkpoint", "left"),
    [
        (wave, POLICY, 0),
        (own, "never", 0),
        (own, POLICY, 0),
        (own, DOTS, 0),
        (looped, "never", 1),
    ],
    ids=["of a stage", "of a layer", "of both", "in another policy", "in a loop"],
)
def test_nothing_is_moved_but_in_loops(layer, checkpoint, left):
    code = forward_of(layer, checkpoint)
    kept = kept_on_device(code)
    assert len(list(moves(code.nodes))) == 1
    assert len(list(moves(kept.nodes))) == left
    assert code.on_host
    assert not kept.on_host
    arrays = [argument(code, arg) for arg in code.args]
    got, want = jax.jit(kept)(*arrays), jax.jit(code)(*arrays)
    assert {a.sharding.memory_kind for a in want} == {"device", "pinned_host"}
    assert {a.sharding.memory_kind for a in got} == {"device"}
    assert_same(got, want)


def argument(code, arg):
    """An array for an argument: a whole batch, a weight, or the microbatch's number."""
    if arg.value is None:
        return jnp.uint32(0)
    return (
        X if arg.window else noise(jax.random.key(2), code.graph.avals[arg.value].shape)
    )


def test_a_code_that_moves_nothing_stays_the_same():
    code = forward_of(wave, "never")
    assert kept_on_device(code) is code
