"""Meshes of the user: in JAX's context, under a batch, and in a layer.

Every public call gives the same under `jax.set_mesh` of any mesh as without one, and
takes what lies over any mesh. The reference is `fpipe.sequential` without a mesh.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.optim
from tests.helpers import WIDTH, assert_same, dense, mse, noise, scale_init


def a_mesh(shape, names, kind, first=0):
    devices = jax.devices()[first : first + int(np.prod(shape))]
    return Mesh(
        np.array(devices).reshape(shape), names, axis_types=(kind,) * len(names)
    )


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
OWN = a_mesh((2,), ("stage",), AUTO)
OWN_EXPLICIT = a_mesh((2,), ("stage",), EXPLICIT)
OTHER = a_mesh((2,), ("model",), EXPLICIT, first=2)
WIDE = a_mesh((2, 2), ("data", "stage"), AUTO)

CONTEXTS = {
    # No device of the pipe is in it: cold calls come first, so they are made here.
    "other explicit": lambda: jax.set_mesh(OTHER),
    "own": lambda: jax.set_mesh(OWN),
    "larger": lambda: jax.set_mesh(WIDE),
    "larger explicit": lambda: jax.set_mesh(
        a_mesh((2, 2), ("data", "stage"), EXPLICIT)
    ),
    "one device": lambda: jax.set_mesh(a_mesh((1,), ("data",), EXPLICIT)),
    "abstract explicit": lambda: jax.sharding.use_abstract_mesh(
        a_mesh((4,), ("data",), EXPLICIT).abstract_mesh
    ),
}


def noisy():
    """A layer with every need that a call gives."""

    def apply(params, x, *, key, side, state, train):
        y = (x - state) * params + side
        y = y if key is None else jnp.where(noise(key, x.shape) < 0.4, y, 0)
        return y, (state + x.mean(0)) / 2 if train else state

    return fpipe.Layer(
        apply, scale_init, name="noisy", init_state=lambda x: jnp.zeros(x.shape[-1])
    )


LAYERS = [dense(), noisy()]
ROWS = (4, WIDTH)
# On the host, as a data loader has them: JAX puts its own arrays on the context's mesh.
KEY, X, TARGET, SIDE = (
    jax.random.key(4),
    *(np.asarray(noise(jax.random.key(n), ROWS)) for n in (1, 2, 3)),
)
REFERENCE = fpipe.sequential(LAYERS, chunks=2)


@functools.cache
def reference_params():
    made = REFERENCE.init(jax.random.key(0), X, side=SIDE)
    return jax.tree.map(np.asarray, made)


def make_pipe(kind):
    options = {
        "placed": {},
        "threads": {"dispatch": "thread_per_device"},
        "scan": {"executor": "scan"},
        "scan over data": {"executor": "scan", "mesh": WIDE},
    }[kind]
    devices = None if "mesh" in options else jax.devices()[:2]
    return fpipe.Pipe(LAYERS, balance=[1, 1], devices=devices, chunks=2, **options)


PIPES = ["placed", "threads", "scan", "scan over data"]


def public_calls(
    pipe, x=X, target=TARGET, side=SIDE, key=KEY, params=None, planned=True
):
    """What every public call of a pipe, or of the reference, gives.

    Arguments:
        planned: whether to plan, compile and record too, which takes long every time.
    """
    whole = reference_params() if params is None else params
    placed: Any = pipe.place(whole)
    gather = pipe.gather if isinstance(pipe, fpipe.Pipe) else tuple
    state = pipe.init_state(x, side=side)
    needs = {"side": side, "key": key, "train": True}
    got = {
        "init": gather(pipe.init(KEY, x, side=side)),
        "init_state": state,
        "place": gather(placed),
        "call": pipe(placed, x, state=state, **needs),
        "evaluate": pipe.evaluate(mse)(placed, x, target, state=state, **needs),
    }
    step = pipe.value_and_grad(mse, argnums=(0, 1, 2))
    loss, grads = step(placed, x, target, state=state, **needs)
    got["step"] = (loss, gather(grads[0]), grads[1:])
    _, twice = step(
        placed, x, target, state=state, grads=grads, loss_scale=8.0, **needs
    )
    got["grads, loss_scale"] = (gather(twice[0]), twice[1:])

    def output(params, x):
        return pipe(params, x, state=state, **needs)

    y, pull_back, new = jax.vjp(output, placed, x, has_aux=True)
    # Under a mesh JAX makes arrays over all of it, and `y` may be on one device.
    cotangent = jax.device_put(np.full(y.shape, 0.5, y.dtype), y.sharding)
    of_params, of_x = pull_back(cotangent)
    got["vjp"] = (y, new, gather(of_params), of_x)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))
    if isinstance(pipe, fpipe.Pipe):
        tx = fpipe.optim.per_stage(tx)
        if planned:
            pipe.compile(placed, x, target, loss_fn=mse, state=state, **needs)
            pipe.plan(placed, x, target, loss_fn=mse, state=state, **needs)
            (value, _), events = pipe.record(
                step, placed, x, target, state=state, **needs
            )
            assert events.calls
            assert_same(value, loss)
        updates, optimizer = tx.update(grads[0], tx.init(placed), placed)
        placed = fpipe.optim.apply_updates(placed, updates)
        norm = fpipe.optim.global_norm(grads[0])
        portable = fpipe.optim.gather(optimizer)
        fpipe.optim.place(portable, placed, tx)
    else:
        updates, portable = tx.update(grads[0], tx.init(placed), placed)
        placed = optax.apply_updates(placed, updates)
        norm = optax.tree.norm(grads[0])
    got["optim"] = (gather(placed), portable, norm)
    return jax.tree.map(np.asarray, got)


@functools.cache
def wanted():
    return public_calls(REFERENCE)


@pytest.mark.parametrize("kind", PIPES)
def test_every_call_under_every_mesh(kind):
    pipe = make_pipe(kind)
    want = wanted()
    # Threads run the programs of "placed", each with the context of the call.
    few = ("other explicit", "larger explicit")
    names = few if kind == "threads" else CONTEXTS
    for name in names:
        context = CONTEXTS[name]
        with context():
            mesh = jax.sharding.get_abstract_mesh()
            got = public_calls(pipe, planned=name in ("other explicit", "own"))
            assert jax.sharding.get_abstract_mesh() == mesh, name
        assert_same(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["placed", "scan"])
def test_a_first_step_under_a_mesh_of_other_devices(kind):
    x = np.asarray(noise(jax.random.key(1), ROWS))
    layers = [dense(), dense()]
    reference = fpipe.sequential(layers, chunks=2)
    params = jax.tree.map(np.asarray, reference.init(KEY, x))
    want = reference.value_and_grad(mse)(params, x, x)
    pipe = fpipe.Pipe(layers, devices=jax.devices()[:2], chunks=2, executor=kind)
    with CONTEXTS["other explicit"]():
        loss, grads = pipe.value_and_grad(mse)(pipe.place(params), x, x)
        grads = pipe.gather(grads)
    assert_same((loss, grads), want)


def test_one_trace_for_all_meshes_and_the_caller_keeps_its_own():
    calls: list[bool] = []

    def layer(params, x):
        calls.append(jax.sharding.get_abstract_mesh().empty)
        return x * params

    for executor in ("placed", "scan"):
        pipe = fpipe.Pipe(
            [layer, layer], devices=jax.devices()[:2], chunks=2, executor=executor
        )
        params = pipe.place((np.float32(2), np.float32(3)))
        want = pipe(params, X)
        with CONTEXTS["own"]():
            assert_same(pipe(params, X), want)
            count = len(calls)
        with CONTEXTS["other explicit"]():
            assert_same(pipe(params, X), want)
            assert len(calls) == count
            with pytest.raises(TypeError):
                pipe(params, "no array")
            assert jax.sharding.get_mesh().axis_names == ("model",)
        assert all(calls)  # a stage on one device has no axes
        calls.clear()


@pytest.mark.parametrize(
    ("kind", "mesh", "spec"),
    [
        ("placed", a_mesh((4,), ("data",), EXPLICIT), P("data")),
        ("threads", OWN_EXPLICIT, P(None, "stage")),
        ("scan", a_mesh((4,), ("data",), EXPLICIT), P("data")),
        ("scan", OWN_EXPLICIT, P(None, "stage")),
        ("scan over data", a_mesh((2, 2), ("data", "stage"), EXPLICIT), P("data")),
    ],
    ids=str,
)
def test_inputs_over_an_explicit_mesh(kind, mesh, spec):
    def over(a):
        return jax.device_put(a, NamedSharding(mesh, spec))

    def rows_over(a):
        axes = [mesh.axis_names[0], *[None] * a.ndim][: a.ndim]
        return jax.device_put(a, NamedSharding(mesh, P(*axes)))

    got = public_calls(
        make_pipe(kind),
        over(X),
        over(TARGET),
        over(SIDE),
        jax.device_put(KEY, NamedSharding(mesh, P())),
        jax.tree.map(rows_over, reference_params()),
        planned=False,
    )
    assert_same(got, wanted())


def test_parameters_on_an_explicit_mesh_of_their_device():
    params = tuple(np.eye(WIDTH, dtype=np.float32) * n for n in (1, 2))
    layers = [lambda p, x: jnp.tanh(x @ p)] * 2
    pipe = fpipe.Pipe(layers, devices=jax.devices()[:2], chunks=2)
    placed = tuple(
        jax.device_put(
            a, NamedSharding(a_mesh((1,), ("data",), EXPLICIT, n), P("data"))
        )
        for n, a in enumerate(params)
    )
    want = fpipe.sequential(layers, chunks=2).value_and_grad(mse)(params, X, TARGET)
    assert_same(pipe.value_and_grad(mse)(placed, X, TARGET), want)


@pytest.mark.parametrize("mesh", [OWN, OWN_EXPLICIT, OTHER, WIDE], ids=str)
def test_scan_inside_jit_under_a_mesh(mesh):
    layers = [dense(), dense()]
    pipe = fpipe.Pipe(layers, devices=jax.devices()[:2], chunks=2, executor="scan")
    params = pipe.init(KEY, X)
    tx = fpipe.optim.per_stage(optax.sgd(0.1, 0.9))
    state = tx.init(params)

    def train(params, state, x):
        loss, grads = pipe.value_and_grad(mse)(params, x, x)
        updates, state = tx.update(grads, state, params)
        return loss, fpipe.optim.apply_updates(params, updates), state

    message = None
    if mesh is WIDE:
        message = r"under `jax.set_mesh` of 4 \(data=2, stage=2\)"
    elif mesh is OTHER:
        # As many devices, but others: JAX sees that when it compiles.
        message = "incompatible devices"
    if message is not None:
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            jax.jit(train)(params, state, X)
        return
    with jax.set_mesh(mesh):
        loss, new, _ = jax.jit(train)(params, state, X)
    want_loss, want, _ = train(params, state, X)
    assert_same((loss, pipe.gather(new)), (want_loss, pipe.gather(want)))


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        (WIDE, P("data")),
        (a_mesh((2, 2), ("stage", "model"), AUTO), P(None, "model")),
        (OWN, None),
    ],
    ids=["data", "model", "stage"],
)
def test_layers_use_the_axes_of_their_stage(mesh, spec):
    seen = []

    def layer(params, x):
        h = jnp.tanh(x @ params)
        if spec is not None:
            h = jax.lax.with_sharding_constraint(h, spec)
        jax.debug.print("sum {}", h.sum())
        jax.debug.callback(lambda a: seen.append(a.shape), h)
        return h

    def plain(params, x):
        return jnp.tanh(x @ params)

    made = fpipe.Layer(layer, lambda key, x: noise(key, (WIDTH, WIDTH)))
    pipe = fpipe.Pipe([made, made], mesh=mesh, chunks=2, executor="scan")
    reference = fpipe.sequential([plain, plain], chunks=2)
    params = pipe.init(KEY, X)
    whole = pipe.gather(params)

    def count():
        jax.effects_barrier()
        found = [seen.pop() for _ in range(len(seen))]
        assert set(found) == {(ROWS[0] // 2, WIDTH)}
        return len(found)

    # Each layer and microbatch once; a recomputation prints again.
    assert_same(pipe(params, X), reference(whole, X))
    assert count() == 4
    loss, grads = jax.jit(pipe.value_and_grad(mse))(params, X, TARGET)
    assert count() >= 4
    assert_same(
        (loss, pipe.gather(grads)), reference.value_and_grad(mse)(whole, X, TARGET)
    )
    of_y = jax.grad(lambda params: mse(pipe(params, X), TARGET))(params)
    assert count() >= 4
    want = jax.grad(lambda params: mse(reference(params, X), TARGET))(whole)
    assert_same(pipe.gather(of_y), want)
    assert pipe.plan(params, X, TARGET, loss_fn=mse).stages


def test_a_callback_that_returns_is_refused_over_shared_stages():
    def ask(params, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return params * jax.pure_callback(np.sin, shape, x)

    layers = [dense(), fpipe.Layer(ask, scale_init, name="ask")]
    pipe = fpipe.Pipe(layers, mesh=WIDE, chunks=2, executor="scan")
    params = pipe.place((reference_params()[0], jnp.ones(WIDTH)))
    with pytest.raises(NotImplementedError, match="layer 1 'ask' has a"):
        pipe(params, X)

    def loss(y):
        return y.mean() + ask(1, y[:1, 0])[0]

    plain = fpipe.Pipe([dense(), dense()], mesh=WIDE, chunks=2, executor="scan")
    params = plain.init(jax.random.key(0), X)
    with pytest.raises(NotImplementedError, match="the loss function has a"):
        plain.evaluate(loss)(params, X)
