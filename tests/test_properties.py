"""Random models on random partitions: the invariant where nobody thought of the case."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fpipe
from tests.helpers import assert_same, mse

WIDTH = 3
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)  # every example compiles
MODES = ["always", "except_last", "never", jax.checkpoint_policies.dots_with_no_batch_dims_saveable]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a random layer does; a value, so that a failing example reads well."""

    stash: tuple[str, ...]
    pop: tuple[str, ...]
    peek: tuple[str, ...]
    needs: tuple[str, ...]


def apply(plan, params, x, **needs):
    """A bit of everything that the plan names, mixed so that no order and no value can be mistaken for another."""
    y = jnp.tanh(x @ params["w"]) + params["b"]
    if "key" in needs and needs["key"] is not None:
        y = y * jax.random.uniform(needs["key"], y.shape, minval=0.5)
    if "side" in needs:
        y = y + jnp.cos(needs["side"])
    if "borrowed" in needs:
        y = y @ needs["borrowed"]["first"]["w"].T
    out = []
    if "carry" in needs:
        carry = needs["carry"]
        for name in plan.peek:
            y = y * jnp.cos(fpipe.peek(carry, name))
        for name in plan.pop:
            value, carry = fpipe.pop(carry, name)
            y = y - value
        for name in plan.stash:
            carry = fpipe.stash(carry, name, jnp.sin(y) * len(name))
        out.append(carry)
    if "state" in needs:
        state = needs["state"]
        y = y + state["mean"]
        out.append({"mean": 0.5 * state["mean"] + x.mean(0), "seen": state["seen"] + x.shape[0]})
    return (y, *out) if out else y


def layer(k, plan):
    def init(key, x):
        del x
        return {"w": jax.random.normal(key, (WIDTH, WIDTH)), "b": jnp.full((WIDTH,), 0.1 * k)}

    def init_state(x):
        return {"mean": jnp.zeros((WIDTH,), x.dtype), "seen": jnp.int32(0)}

    return fpipe.Layer(
        functools.partial(apply, plan),
        init,
        "first" if k == 0 else f"layer{k}",
        plan.stash,
        plan.pop,
        plan.peek,
        needs=plan.needs,
        borrow=("first",) if "borrowed" in plan.needs else (),
        init_state=init_state if "state" in plan.needs else None,
    )


@st.composite
def models(draw):
    """Layers with skips between any two of them, in namespaces, and needs of every kind."""
    count = draw(st.integers(2, 6))
    stash, pop, peek = ([list[str]() for _ in range(count)] for _ in range(3))
    for n in range(draw(st.integers(0, 4))):
        a = draw(st.integers(0, count - 2))
        b = draw(st.integers(a + 1, count - 1))
        stash[a].append("s" * (n + 1))
        pop[b].append("s" * (n + 1))
        for k in range(a + 1, b):
            if draw(st.booleans()):
                peek[k].append("s" * (n + 1))
    layers = []
    for k in range(count):
        needs = draw(st.sets(st.sampled_from(["key", "side", "state", *(["borrowed"] if k else [])]), max_size=2))
        if stash[k] or pop[k] or peek[k]:
            needs = needs | {"carry"}
        layers.append(layer(k, Plan(tuple(stash[k]), tuple(pop[k]), tuple(peek[k]), tuple(sorted(needs)))))
    return layers


@st.composite
def partitions(draw, layers):
    count = len(layers)
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=3)))
    balance = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    devices = [jax.devices()[draw(st.integers(0, 3))] for _ in balance]
    return {
        "balance": balance,
        "devices": devices,
        "chunks": draw(st.integers(1, 5)),
        "checkpoint": draw(st.sampled_from(MODES)),
        "schedule": draw(st.sampled_from(["gpipe", "1f1b", "eager_1f1b"])),
    }


def check(data):
    layers = data.draw(models())
    options = data.draw(partitions(layers))
    rows = data.draw(st.integers(1, 7))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    pipe = fpipe.Pipe(layers, **options)
    reference = fpipe.sequential(layers, chunks=options["chunks"])
    x, target, side = (jax.random.normal(jax.random.key(k), (rows, WIDTH)) for k in range(3))
    params = reference.init(jax.random.key(3), x, side=side)
    state = reference.init_state(x, side=side) if any(one.asks("state") for one in layers) else None
    needs = {"side": side, "key": jax.random.key(4), "state": state}
    arguments = {"reduction": reduction, "argnums": (0, 1, 2)}
    got = pipe.value_and_grad(mse, **arguments)(pipe.place(params), x, target, **needs)
    want = jax.jit(reference.value_and_grad(mse, **arguments))(params, x, target, **needs)
    assert_same(got, want)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(st.data())
def test_random_models_on_random_partitions(data):
    check(data)


@pytest.mark.full
@settings(max_examples=1000, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_many_random_models_on_random_partitions(data):
    check(data)
