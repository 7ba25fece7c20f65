"""Four simulated CPU devices, and a compilation cache shared by all runs."""

import pathlib
import signal

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update(
    "jax_compilation_cache_dir",
    str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def interruptible():
    """Ctrl-C reaches the test, and the programs that it starts, also where the tests
    run in a background that ignores it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
