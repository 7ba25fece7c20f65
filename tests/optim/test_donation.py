"""Whoever donates what fpipe returned never touches what was given."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fpipe
import fpipe.optim
from tests.helpers import dense, mse, noise

WIDTH = 4


pytestmark = pytest.mark.usefixtures("promotion")


def aligned(array):
    """A copy in memory that JAX on a CPU takes as it is."""
    array = np.asarray(array)
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    new = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    new[...] = array
    return new


class Held:
    """What a user holds, and what was in it."""

    def __init__(self):
        self._trees: list[tuple[str, Any, Any]] = []

    def hold(self, name, tree):
        self._trees.append((name, tree, jax.tree.map(np.array, tree)))
        return tree

    def check(self):
        jax.effects_barrier()
        for name, tree, before in self._trees:
            for a, b in zip(
                jax.tree.leaves(tree), jax.tree.leaves(before), strict=True
            ):
                assert not (isinstance(a, jax.Array) and a.is_deleted()), name
                np.testing.assert_array_equal(np.asarray(a), b, name)


_zero = jax.jit(lambda a: a * 0, donate_argnums=0)


def donate(tree):
    """Give every array away, as a user may who got it, and overwrite it."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            jax.block_until_ready(_zero(leaf))


# Each executor with a stage on every device, and with all of them on one.
PIPES = {
    "sequential": lambda layers: fpipe.sequential(layers, chunks=2),
    "placed": lambda layers: fpipe.Pipe(layers, [1, 1], chunks=2),
    "placed-one": lambda layers: fpipe.Pipe(
        layers, [1, 1], [jax.devices()[0]] * 2, chunks=1
    ),
    "scan": lambda layers: fpipe.Pipe(layers, [1, 1], chunks=2, executor="scan"),
    "scan-one": lambda layers: fpipe.Pipe(layers, [2], chunks=1, executor="scan"),
}


# What differs with numpy's arrays is `place`, which is one for each executor.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "jax") for name in PIPES), ("placed-one", "numpy"), ("scan", "numpy")],
)
def test_what_a_user_gave_outlives_what_a_user_got(name, kind):
    pipe: Any = PIPES[name]([dense(), dense()])
    held = Held()
    x = noise(jax.random.key(1), (4, WIDTH))
    start = fpipe.sequential([dense()] * 2).init(jax.random.key(0), x)
    if kind == "numpy":
        mine = jax.tree.map(aligned, start)
    else:
        # Where `place` has them: then it has nothing to move.
        devices = getattr(pipe, "devices", jax.devices()[:1])
        mine = tuple(
            jax.device_put(jax.tree.map(np.asarray, layer), device)
            for layer, device in zip(start, itertools.cycle(devices))
        )
    held.hold("given to place", mine)
    donate(pipe.place(mine))
    params = held.hold("placed", pipe.place(mine))
    donate(pipe.gather(params))
    held.check()
    # The biases' gradients come out of the masked optimizer as they went in.
    adam = optax.masked(
        optax.adam(1e-2), lambda p: jax.tree.map(lambda a: a.ndim > 1, p)
    )
    tx = fpipe.optim.per_stage(adam)
    step = pipe.value_and_grad(mse)
    if name == "sequential":
        params = held.hold("placed", jax.device_put(params, jax.devices()[0]))
    donate(tx.init(params))
    state = held.hold("state", tx.init(params))
    donate(fpipe.optim.gather(state))
    whole = held.hold("gathered state", fpipe.optim.gather(state))
    donate(fpipe.optim.place(whole, params, tx))
    stored = held.hold("stored state", jax.tree.map(aligned, whole))
    donate(fpipe.optim.place(stored, params, tx))
    held.check()
    donate(pipe(params, x))
    _, grads = step(params, x, x)
    held.hold("gradients", grads)
    donate(step(params, x, x, grads=grads, loss_scale=np.float32(2)))
    held.check()
    updates, new = held.hold("updates", tx.update(grads, state, params))
    donate(tx.update(grads, state, params))
    held.check()
    donate(fpipe.optim.apply_updates(params, updates))
    # The same by fpipe's own donation: what is not named stays.
    eager = fpipe.optim.per_stage(adam, donate=["state", "grads"])
    kept = held.hold("kept", (pipe.gather(params), fpipe.optim.gather(new)))
    params, state = pipe.place(kept[0]), fpipe.optim.place(kept[1], params, tx)
    grads = pipe.place(pipe.gather(grads))
    updates, state = eager.update(grads, state, params)
    fpipe.optim.apply_updates(params, updates, donate=["params", "updates"])
    held.check()


@pytest.mark.parametrize("name", ["sequential", "placed", "scan"])
def test_arrays_that_init_returns_stay_with_the_user(name):
    held = Held()
    table = held.hold("table", jax.device_put(jnp.eye(WIDTH), jax.devices()[0]))
    layer = fpipe.Layer(
        lambda p, x, *, state: (x @ p @ state, state),
        lambda key, x: table,
        init_state=lambda x: table,
    )
    pipe = PIPES[name]([layer, layer])
    x = jnp.ones((4, WIDTH))
    donate(pipe.init(jax.random.key(0), x))
    donate(pipe.init_state(x))
    held.check()


@pytest.mark.quick
def test_place_hands_over_what_it_is_told_to():
    """With `donate` arrays that are at home are the very ones: no second copy."""
    pipe = PIPES["placed-one"]([dense(), dense()])
    params = fpipe.sequential([dense()] * 2).init(
        jax.random.key(0), jnp.ones((4, WIDTH))
    )
    # Through numpy: an array without a weak type needs no conversion.
    mine = jax.device_put(jax.tree.map(np.asarray, params), jax.devices()[0])
    where = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(mine)]
    for place, same in (
        (lambda: pipe.place(mine), False),
        (lambda: pipe.place(mine, donate=True), True),
        (lambda: fpipe.optim.place(mine, mine), False),
        (lambda: fpipe.optim.place(mine, mine, donate=True), True),
    ):
        got = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(place())]
        assert [a == b for a, b in zip(got, where, strict=True)] == [same] * len(where)
