"""Codes that leave on the device what they would move to the host."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from fpipe._model.remat import Remat
from fpipe._program.host_memory import kept_on_device
from fpipe._program.stage_programs import SplitSpec, split_stage
from tests.helpers import assert_same, noise
from tests.program.test_split import W, joint_of

POLICY = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["product"],
    offload_src="device",
    offload_dst="pinned_host",
)
DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")


def wave(w, x):
    return jnp.sin(checkpoint_name(x @ w, "product"))


def own(w, x):
    return jax.checkpoint(wave, policy=POLICY)(w, x)


def looped(w, x):
    return jax.lax.scan(lambda x, _: (own(w, x), None), x, None, length=2)[0]


def forward_of(layer, checkpoint):
    """The code of the forward of a stage in the middle."""
    joint = joint_of(layer, W, None if checkpoint == "never" else Remat.of(checkpoint))
    counts = tuple((leaf, 1) for leaf in joint.cotangents)
    code = split_stage(joint, SplitSpec(1, counts)).by_kind["F"].code
    assert code is not None
    return code


def moves(nodes):
    """The equations that move something to the host, at any depth."""
    for node in nodes:
        if node.name == "device_put" and any(
            v.aval.memory_space == jax.memory.Space.Host for v in node.eqn.outvars
        ):
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
    taken = [code.graph.avals[arg.value] for arg in code.args if arg.value is not None]
    arrays = [noise(jax.random.key(k), aval.shape) for k, aval in enumerate(taken)]
    got, want = jax.jit(kept)(*arrays), jax.jit(code)(*arrays)
    assert {a.sharding.memory_kind for a in want} == {"device", "pinned_host"}
    assert {a.sharding.memory_kind for a in got} == {"device"}
    assert_same(got, want)


def test_a_code_that_moves_nothing_stays_the_same():
    code = forward_of(wave, "never")
    assert kept_on_device(code) is code
