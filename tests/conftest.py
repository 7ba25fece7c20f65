"""Four simulated CPU devices, quick compilation, and a cache of it for all runs."""

import gc
import os
import pathlib
import signal
import time

import beartype
import beartype.claw
import hypothesis
import jax
import pytest

from tests import speed

# Tests compile thousands of small programs and run each a few times, so they ask XLA
# for code that is made fast, not for fast code: without optimization, without the
# emitters of fused loops, and without a split of each program over threads. That is a
# third of the compile time. `XLA_FLAGS= python -m pytest` tests what users run.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# Later releases do not have this flag, and XLA ends a process with an unknown one.
if jax.__version_info__ < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

# How long an example takes depends on the machine, and says nothing of the library.
hypothesis.settings.register_profile(
    "steady", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update(
    "jax_compilation_cache_dir",
    str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Without the Python lines of its operations a sharded program compiles in nine tenths
# of the time: the partitioner takes them through several forms.
jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_addoption(parser):
    text = "check the types of every call within fpipe, as `-m quick` does"
    parser.addoption("--typed", action="store_true", help=text)


def pytest_configure(config):
    """Whether types are checked.

    They are when tests ask for it, before the package is imported. Not in every run:
    what is refused with a message of ours would be refused by the type checker first,
    which has no remedy to offer.
    """
    if config.option.typed or config.option.markexpr == "quick":
        # Annotated variables are left to the static checker. An `int` is a `float`.
        conf = beartype.BeartypeConf(claw_is_pep526=False, is_pep484_tower=True)
        beartype.claw.beartype_package("fpipe", conf=conf)
        for message in (
            r"(.|\n)*not decoratable by @beartype",  # a generic named tuple
            "Do not use the `random` module",  # it looks at one entry of a list
        ):
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


def runs_scripts(module):
    """Whether a module of tests imports what runs scripts."""
    from tests import scripts  # it reads the flags that are set above

    return any(
        value is scripts or value is scripts.run for value in vars(module).values()
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.quick(cases=3)`: of the cases of a parametrized test, the quick
    check runs three that are spread over all, but none that the full run alone has.

    Tests of scripts come first: they take longest, and no worker is to begin one when
    the others have nothing left.
    """
    items.sort(key=lambda item: not runs_scripts(item.module))
    cases = {}
    for item in items:
        if mark := item.get_closest_marker("quick"):
            if item.get_closest_marker("full"):
                item.own_markers.remove(mark)
                continue
            test = item.nodeid.partition("[")[0]
            cases.setdefault(test, []).append((item, mark))
    for among in cases.values():
        count = among[0][1].kwargs.get("cases", len(among))
        kept = {n * len(among) // count for n in range(count)}
        for n, (item, mark) in enumerate(among):
            if n not in kept:
                item.own_markers.remove(mark)


speed.set_up()


KEPT = 100.0
"""For how many seconds of work JAX keeps what it has traced and lowered."""


@pytest.fixture(scope="session")
def last_clearing():
    """When the heap was made small, in seconds of this process: one entry."""
    gc.freeze()  # what imports have made stays
    return [time.process_time()]


@pytest.fixture(autouse=True, scope="module")
def small_heap(last_clearing):
    """What modules leave is given back, or looked at no more.

    JAX keeps what it has traced and lowered: some gigabytes in the end, in which each
    further program takes twice as long, and millions of objects that each collection
    would walk over. But the small programs that all modules share, such as those of
    `jnp.ones` and `noise`, are made again after each clearing, so small modules leave
    theirs to the next.
    """
    yield
    if time.process_time() - last_clearing[0] > KEPT:
        jax.clear_caches()
        speed.forget_contexts()
        gc.collect()
        gc.freeze()
        last_clearing[0] = time.process_time()


@pytest.fixture
def own_heap():
    """`gc.collect()` walks over what the test makes, not over millions of objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def interruptible():
    """Ctrl-C reaches the test, and the programs that it starts, also where the tests
    run in a background that ignores it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def promotion():
    """`optax` raises floats to integer powers, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
