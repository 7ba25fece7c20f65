"""The settings of JAX: which change a trace, and that threads have their caller's."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpipe._core.settings import _CONTEXTS, CallerContext, settings


def traces():
    """What a layer may trace to that depends on a setting of JAX, as text."""
    square, row = jnp.ones((4, 4)), jnp.arange(4.0)

    def reference():
        ref = jax.new_ref(row)
        ref[0] = 1.0
        return ref[...]

    functions = [
        lambda: square @ square,
        lambda: jax.random.key_data(jax.random.key(3)),
        lambda: jax.random.PRNGKey(3),
        lambda: jax.random.bits(jnp.zeros(2, jnp.uint32)),
        lambda: jax.random.gumbel(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32))),
        lambda: square + row,
        lambda: jnp.ones(3, jnp.int8) + jnp.ones(3),
        lambda: jnp.asarray(np.ones(3)),
        lambda: jnp.ones(3, "float64"),
        lambda: jax.grad(lambda v: jax.nn.softmax(v)[0])(row),
        lambda: row[7],
        lambda: row / row,
        lambda: jax.grad(jax.checkpoint(lambda v: jnp.sin(jnp.sin(v)).sum()))(row),
        reference,
    ]
    texts = []
    for f in functions:
        # A new function each time: JAX keeps the trace of a known one.
        try:
            texts.append(str(jax.jit(lambda f=f: f()).trace().jaxpr))
        except (TypeError, ValueError) as error:
            texts.append(str(error))
    return texts


def another(name, value):
    """Another value of a setting; `None` if it is free text, such as a path."""
    _, _, details = jax.config.meta[name]
    if name == "jax_default_device":
        return jax.devices()[1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    values = details.get("enum_values") or list(details.get("enum_class", ()))
    # A key of another size would not fit into what the traces make of it.
    values = [v for v in values if v not in (value, "threefry4x32")]
    return values[-1] if values else None


# They change no trace, and what they do instead would disturb the test.
NOT_HERE = {
    "jax_no_execution",
    "jax_no_tracing",
    "jax_logging_level",
    "jax_log_compiles",
    "jax_explain_cache_misses",
    "jax_log_checkpoint_residuals",
    "jax_disable_jit",
    "jax_array_garbage_collection_guard",
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_device_to_device",
}


@pytest.mark.filterwarnings("ignore")
def test_every_setting_that_changes_a_trace_changes_the_token():
    token, plain = settings(), traces()
    assert settings() == token
    assert hash(settings()) == hash(token)
    assert traces() == plain
    unseen, seen = [], []
    for name, value in sorted(jax.config.values.items()):
        new = None if name in NOT_HERE else another(name, value)
        if new is None:
            continue
        try:
            jax.config.update(name, new)
        except (RuntimeError, ValueError, TypeError):
            continue  # only before the first use of JAX
        try:
            changed = settings() != token
            if not changed and traces() != plain:
                unseen.append(name)
        finally:
            jax.config.update(name, value)
        if changed:
            seen.append(name)
        assert settings() == token, name
    assert unseen == []
    # What decides the kind of a key, and what JAX has in its own key.
    assert {
        "jax_default_prng_impl",
        "jax_enable_custom_prng",
        "jax_legacy_prng_key",
        "jax_random_seed_offset",
        "jax_threefry_partitionable",
        "jax_debug_nans",
        "jax_debug_infs",
        "jax_enable_x64",
    } <= set(seen)


def test_the_token_is_no_equation_and_the_same_without_jit():
    token = settings()
    within = []

    def f(x):
        within.extend([settings(), settings()])
        return x

    assert not jax.make_jaxpr(f)(1.0).eqns
    assert within[0] == within[1]
    with jax.disable_jit():
        assert settings() == settings()
    assert settings() == token


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _CONTEXTS)
def test_a_thread_works_under_each_setting_of_its_caller(name):
    new = another(name, getattr(jax.config, name))
    seen = []

    def look():
        seen.append(getattr(jax.config, name))

    with _CONTEXTS[name](new):
        context = CallerContext.here()
        thread = threading.Thread(target=context.run, args=(look,))
        thread.start()
        thread.join()
        assert seen == [getattr(jax.config, name)]
    assert seen != [getattr(jax.config, name)]
