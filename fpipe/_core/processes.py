"""Several processes, joined by `jax.distributed`: who has an array, and how it goes
from one process to another.

An array on devices of another process is known here by its shape alone. Such a *ghost*
stands where the array would, so that trees have one structure in all processes:

    process 0                               process 1
    params[0]: f32[8,8] on cpu:0            a ghost
    params[1]: a ghost                      f32[8,8] on cpu:2048

An array goes to another process by `jax.device_put`, which has rules of its own there
(jax 0.10.2):

- Every process issues every transfer, also those between two others, in one order. JAX
  numbers them in each process. If a process leaves one out, the numbers no longer
  agree, and a receiver gets the data of another transfer.
- One `device_put` goes one way: from some devices to others, never both ways.
- The first transfer to a process waits for the sender. So before the first one all
  programs are compiled, and the processes wait for each other (`meet`). Then a tiny
  array goes before all others (`connect`).
- An array that is donated before it has gone is lost: nothing holds it. So if somebody
  else may donate an array, a copy is sent.
- An array without elements never arrives. `put_across` makes it anew on the other side.
- Typed keys are refused. `put_across` sends their numbers.
"""

import functools
import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.errors import add_note
from fpipe._core.pytrees import Tracer, copied, is_traced
from fpipe._core.watchdog import Describe, drain, expect, waiting

Device: TypeAlias = Any


class Link(NamedTuple):
    """A way from a device to one of another process."""

    source: Device
    target: Device


def is_here(sharding: Sharding) -> bool:
    """Whether a device of a sharding is of this process."""
    return bool(sharding.addressable_devices)


def is_ghost(array: Any) -> bool:
    """Whether this process knows an array by its shape alone."""
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return False
    return not is_here(array.sharding)


def processes_of(sharding: Sharding) -> frozenset[int]:
    """The processes whose devices are in a sharding."""
    return frozenset(device.process_index for device in sharding.device_set)


def is_shared(sharding: Sharding) -> bool:
    """Whether this process has some devices of a sharding, and others have the rest."""
    return is_here(sharding) and not sharding.is_fully_addressable


def own_copy(array: Any) -> Any:
    """The process's own copy of an array that is whole on devices of several processes.
    Another array stays as it is.
    """
    if not isinstance(array, jax.Array) or is_traced(array):
        return array
    if is_shared(array.sharding) and array.is_fully_replicated:
        return array.addressable_data(0)
    return array


def whole_here(array: Any) -> Any:
    """A whole copy in this process of an array that all processes have parts of.
    Another array stays as it is. Every process makes this call, with the same arrays in
    the same order.
    """
    if not isinstance(array, jax.Array) or is_traced(array):
        return array
    sharding = array.sharding
    if not is_shared(sharding) or len(processes_of(sharding)) < jax.process_count():
        return array
    if not array.is_fully_replicated:
        assert isinstance(sharding, NamedSharding)
        array = _reshard(array, NamedSharding(sharding.mesh, P()))
    return array.addressable_data(0)


def host_copy(array: Any) -> Any:
    """`whole_here` in the host's memory; another array stays where it is."""
    whole = whole_here(array)
    return array if whole is array else np.asarray(whole)


def lay(array: Any, target: Sharding) -> jax.Array:
    """An array on devices of several processes. Each process gives all of it.

    `device_put` is no help: to such devices it takes only numpy arrays, and it may
    compare them between all processes of the job. Some processes make no such call, and
    the others would wait for them (jax 0.10.2).
    """
    if isinstance(array, jax.Array) and array.sharding.device_set == target.device_set:
        return _reshard(array, target)
    whole = own_copy(array)
    if not isinstance(whole, jax.Array):
        whole = np.asarray(whole)
        whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype))
    indices = target.addressable_devices_indices_map(whole.shape)
    shards = jax.device_put([whole[at] for at in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(
        whole.shape, target, shards, dtype=whole.dtype
    )


def _reshard(array: jax.Array, target: Sharding) -> jax.Array:
    """An array with another sharding over its devices. All its processes call it."""

    def describe() -> str:
        return "a program that lays an array out anew, which other processes run too"

    with waiting(describe):
        made = _reshard_to(target)(array)
    if is_shared(target):
        expect(made, describe)
    return made


@functools.lru_cache(maxsize=256)
def _reshard_to(target: Sharding) -> Any:
    """A program that gives an array this sharding. All its processes run it."""
    return jax.jit(lambda array: array, out_shardings=target)


def ghost(shape: Sequence[int], dtype: Any, sharding: Sharding) -> jax.Array:
    """An array that other processes have. It takes 70 µs to make (jax 0.10.2, CPU)."""
    return jax.make_array_from_single_device_arrays(
        tuple(shape), sharding, [], dtype=dtype
    )


def unknown_flag(array: jax.Array) -> jax.Array:
    """A truth value that the process of an array has."""
    device = min(array.devices(), key=lambda device: device.id)
    return ghost((), np.bool_, SingleDeviceSharding(device))


def alive(own: jax.Array) -> jax.Array:
    """A ghost that may be handed out again: whoever had it may have donated it."""
    if own.is_deleted():
        return ghost(own.shape, own.dtype, own.sharding)
    return own


def first_devices() -> list[Device]:
    """The first device of each process, in their order."""
    firsts: dict[int, Device] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    return [firsts[process] for process in sorted(firsts)]


# --- all processes together ---


def meet(numbers: Sequence[int] | np.ndarray, describe: Describe) -> np.ndarray:
    """What each process gives; all of them wait here for each other.

    Arguments:
        numbers: as many in each process; they fit in 32 bits.
        describe: says what is waited for.

    Returns:
        uint32, one row for each process.
    """
    greet(None, describe)
    return _met(numbers, describe)


def _met(numbers: Sequence[int] | np.ndarray, describe: Describe) -> np.ndarray:
    given = np.asarray([numbers], np.uint32)
    mesh = Mesh(np.array(first_devices()), ("process",))
    with waiting(describe), jax.disable_jit(False), jax.transfer_guard("allow"):
        array = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("process")), given
        )
        # Between CPUs the program then runs, and waits, in this thread. It would hold
        # one that sends if its input was not there yet.
        jax.block_until_ready(array)
        try:
            return np.asarray(_everywhere(mesh)(array))
        except jax.errors.JaxRuntimeError as error:
            add_note(
                error,
                f"this process has waited for {describe()}; another one has ended or "
                "does not answer, and what it printed says why",
            )
            raise


def as_words(text: str, size: int) -> np.ndarray:
    """A text as `size` numbers of 32 bits, for `meet`; what is too long is cut off."""
    said = text.encode()[: 4 * size].ljust(4 * size, b"\0")
    return np.frombuffer(said, np.uint32)


def as_text(words: np.ndarray) -> str:
    """The text that `as_words` was given."""
    return words.tobytes().decode(errors="ignore").rstrip("\0")


# Whether this process has met the others.
_greeted: list[bool] = []
_WORDS = 100  # of what a process has raised


def greet(
    raised: str | None,
    describe: Describe = lambda: "all processes to make their first call together",
) -> None:
    """Before the first meeting of a process: all say that they are well, or what they
    have raised. Later it does nothing.

    A process that raises before it meets the others takes part too, before it ends. JAX
    would have them wait for it to connect, and then not say which process is missing.

    Arguments:
        raised: what this process has raised, if anything.

    Raises:
        RuntimeError: another one has raised.
    """
    if _greeted:
        return
    _greeted.append(True)
    rows = _met(as_words(raised or "", _WORDS), describe)
    for process, text in enumerate(map(as_text, rows)):
        if text and raised is None:
            raise RuntimeError(
                f"process {process} has raised before its first call with the others: "
                f"{text}. Its own output has the traceback"
            )


def arrive(received: Any, describe: Describe) -> None:
    """Wait until what was sent has arrived, in every process.

    What follows may meet the others over all devices, as the save of a checkpoint does.
    Between CPUs each of these then holds a thread, and sending needs one too. After
    `fpipe.distributed.initialize` there are enough. This does not rely on it: it meets
    the others with one device alone.

    Arguments:
        received: the arrays that were sent to this process, in any pytree.
    """
    with waiting(describe):
        jax.block_until_ready(received)
    drain()
    meet([0], describe)


@functools.lru_cache(maxsize=1)
def _everywhere(mesh: Mesh) -> Any:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))


def share(arrays: Sequence[Any]) -> list[np.ndarray]:
    """The numbers of small arrays, in every process. Each has them from a process that
    has the array; all wait for each other.
    """
    # As float64, two words each, which holds every float32 and int32.
    words: list[np.ndarray] = []
    for array in arrays:
        own = np.zeros(array.shape) if is_ghost(array) else np.asarray(array)
        words.append(np.array([not is_ghost(array)], np.uint32))
        words.append(own.astype(np.float64).reshape(-1).view(np.uint32))
    rows = meet(
        np.concatenate([*words, np.zeros(1, np.uint32)]),
        lambda: "all processes to tell what their part of the call has made",
    )
    found = []
    start = 0
    for array in arrays:
        end = start + 1 + 2 * array.size
        row = rows[int(np.argmax(rows[:, start])), start + 1 : end]
        numbers = np.ascontiguousarray(row).view(np.float64)
        found.append(numbers.reshape(array.shape).astype(array.dtype))
        start = end
    return found


def gather_floats(numbers: np.ndarray, describe: Describe) -> np.ndarray:
    """The float64 numbers of all processes, one row for each."""
    rows = meet(numbers.astype(np.float64).reshape(-1).view(np.uint32), describe)
    return np.ascontiguousarray(rows).view(np.float64)


def clock_offsets() -> np.ndarray:
    """How far the `time.perf_counter` of each process is ahead of that of process 0.

    All leave a meeting at almost the same moment: within 0.1 ms on one machine. The
    median of several is taken.
    """

    def describe() -> str:
        return "all processes to compare their clocks"

    moments = []
    for _ in range(5):
        meet([0], describe)
        moments.append(time.perf_counter())
    rows = gather_floats(np.array(moments), describe)
    return np.median(rows - rows[0], axis=1)


def digest(text: str) -> int:
    """A number of 32 bits that is equal for equal texts, in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


# --- from one process to another ---


# The links that have carried something. All processes have the same ones.
_connected: set[Link] = set()


def connect(links: Iterable[Link]) -> None:
    """Send something tiny over each link that is new, one after the other.

    Every process calls it, with the same links, when it has compiled what it will run.
    """
    new = [link for link in dict.fromkeys(links) if link not in _connected]
    if new:
        meet([digest(str(new))], lambda: "all processes to connect")
    for link in new:
        _connected.add(link)
        source, target = map(SingleDeviceSharding, link)
        if is_here(source):
            tiny = jax.device_put(np.zeros((1,), np.int32), source)
        else:
            tiny = ghost((1,), np.int32, source)

        def describe(link: Link = link) -> str:
            return f"a first transfer from {link.source} to {link.target}"

        with waiting(describe):
            sent = jax.device_put(tiny, target)
            if is_here(target):
                sent.block_until_ready()


def goes_as_it_is(array: Any) -> bool:
    """Whether `jax.device_put` sends an array, or one of this shape."""
    is_key = jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)
    return array.size > 0 and not is_key


def put_across(
    arrays: Sequence[Any],
    targets: Sequence[Sharding],
    describe: Describe,
    owned: bool = False,
) -> list[Any]:
    """Arrays of one place on another one, of another process.

    Arguments:
        arrays: all on the same devices; ghosts, where those are not of this process.
        targets: how each is to lie there.
        describe: says what they are, if they do not come.
        owned: whether nobody will donate them; else copies are sent.

    Returns:
        The arrays; ghosts, where the other place is not of this process.
    """
    made = list(arrays)
    keys: dict[int, Any] = {}
    sent: list[int] = []
    for n, array in enumerate(arrays):
        if array.size == 0:
            made[n] = _empty(array, targets[n])
            continue
        if not goes_as_it_is(array):
            keys[n] = jax.random.key_impl(array)
            made[n] = jax.random.key_data(array)
        sent.append(n)
    if not sent:
        return made
    going = [made[n] for n in sent]
    if not owned and not is_ghost(going[0]):
        going = copied(going)
    there = jax.device_put(going, [targets[n] for n in sent])
    if is_here(targets[sent[-1]]):
        expect(there[-1], describe)
    for n, array in zip(sent, there, strict=True):
        made[n] = array
    for n, impl in keys.items():
        made[n] = jax.random.wrap_key_data(made[n], impl=impl)
    return made


def fetch(arrays: Sequence[Any], firsts: Sequence[Device]) -> list[Any]:
    """Arrays on devices of several processes, on one device of each process.

    Every process calls it, with the same arrays.

    Arguments:
        firsts: the device of each process.
    """
    found = list(arrays)
    # From each holder in turn, in an order that all processes have.
    groups: dict[_Holder, list[int]] = {}
    for n, array in enumerate(arrays):
        if isinstance(array, jax.Array) and not is_traced(array):
            groups.setdefault(_Holder.of(array), []).append(n)
    connect(
        Link(holder.device, first)
        for holder in groups
        for first in firsts
        if first.process_index not in holder.processes
    )
    for holder, numbers in groups.items():
        whole = [_whole(arrays[n], holder.device) for n in numbers]
        for first in firsts:
            own = whole
            if first.process_index not in holder.processes:
                own = put_across(
                    whole,
                    [SingleDeviceSharding(first)] * len(whole),
                    lambda source=holder.device: f"what is gathered from {source}",
                )
            if first.process_index == jax.process_index():
                for n, array in zip(numbers, own, strict=True):
                    found[n] = array
    return found


def gather(arrays: Sequence[Any], firsts: Sequence[Device]) -> list[Any]:
    """As `fetch`, and no process goes on before all of them have the arrays."""
    found = fetch(arrays, firsts)
    arrive(found, lambda: "all processes to have what is gathered")
    return found


class _Holder(NamedTuple):
    """Who has an array.

    Attributes:
        device: the first of its devices: it sends the array to others.
        processes: those that have a part of it, and make the whole themselves.
    """

    device: Device
    processes: frozenset[int]

    @classmethod
    def of(cls, array: jax.Array) -> "_Holder":
        device = min(array.devices(), key=lambda device: device.id)
        return cls(device, processes_of(array.sharding))


def _whole(array: Any, device: Device) -> Any:
    """All of an array on one of its devices, or, if it is on devices of several
    processes, in each of them.
    """
    target = SingleDeviceSharding(device)
    if array.sharding == target:
        return array
    if is_ghost(array):
        return ghost(array.shape, array.dtype, target)
    if not is_shared(array.sharding):
        return jax.device_put(array, target)
    if not array.is_fully_replicated:
        array = _reshard(array, NamedSharding(array.sharding.mesh, P()))
    for shard in array.addressable_shards:
        if shard.device == device:
            return shard.data
    return array.addressable_data(0)


def _empty(array: Any, target: Sharding) -> Any:
    """An array without elements, somewhere else."""
    if not is_here(target):
        return ghost(array.shape, array.dtype, target)
    shards = [
        jax.device_put(jax.numpy.zeros(target.shard_shape(array.shape), array.dtype), d)
        for d in sorted(target.addressable_devices, key=lambda d: d.id)
    ]
    return jax.make_array_from_single_device_arrays(array.shape, target, shards)
