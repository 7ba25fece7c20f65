"""For tests of your own pipelines: compare a pipe with the plain composition, and draw
random models, partitions and schedules.

`assert_equals_sequential` returns nothing if the two are equal. Otherwise it raises an
error that names the first difference:

    AssertionError: the gradient of params, layer 2 'dense' (stage 2 on TFRT_CPU_2) at
    ['w']: 1 of 16 numbers differ; at (1, 3) the pipe gives 1.25, the plain composition
    0.25; the largest difference is 1, allowed is 3e-06

The strategies need hypothesis; the assertion does not.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fpipe._core.checks import as_bool, as_int, is_at_least
from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe, is_array, is_inexact
from fpipe._executors.added_actions import EXPLICIT_RECOMPUTE
from fpipe._executors.call import as_argnums
from fpipe._executors.placement import UNSHARD
from fpipe._executors.sequential import sequential
from fpipe._model.layer import Layer
from fpipe._model.loss import Reduction, as_loss
from fpipe._model.microbatch import cut_inputs
from fpipe._model.skips import peek, pop, stash
from fpipe._pipe import Pipe
from fpipe._split.split import Split
from fpipe.schedules import Action, Kind, Schedule
from fpipe.schedules._rules import needs as needed_actions

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# What it imports, such as `Pipe`, has its home elsewhere.
__all__ = ["assert_equals_sequential", "models", "partitions", "schedules"]


def assert_equals_sequential(
    pipe: Pipe,
    x: PyTree,
    *targets: PyTree,
    loss_fn: Callable[..., Any] | None = None,
    params: PyTree = None,
    side: PyTree = None,
    key: Any = None,
    state: PyTree = None,
    train: bool = False,
    step: Any = None,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    argnums: int | Sequence[int] = (0, 1),
    tolerance: float | None = None,
) -> None:
    """Check that a pipe computes what `fpipe.sequential` computes, at equal `chunks`.

    A pipe of an `fpipe.Split` is compared with the function that was split. The check
    compares the output and the new state, and with `loss_fn` also the loss, aux and
    gradients. It compares structure, shapes and dtypes first, then values.

    Arguments:
        pipe: a `Pipe`, with either executor.
        x, targets, side, key, state, train, step: as for a call. Without `state`,
            layers with state start from the state of `init_state`.
        loss_fn, has_aux, reduction, argnums: as for `pipe.value_and_grad`.
        params: the parameters, one entry per layer. For an `fpipe.Split` they are the
            function's own tree. Default: the parameters of `init` from
            `jax.random.key(0)`.
        tolerance: the largest allowed difference of an array, as a share of its largest
            number: `max|a - b| <= tolerance * max|b|`. Default 1e-5, or 2e-2 if the
            model computes in 16-bit floats. If a gradient is a small difference of
            large numbers, compare in float64 (`with jax.enable_x64(True):`) rather than
            with a large tolerance. Some gradients are only rounding errors, such as
            that of a bias before a batch norm. They pass up to 16 roundings of the
            largest gradient among the layer's parameters, or up to `tolerance` of it,
            whichever is less.

    Raises:
        AssertionError: the two differ. The message names the first array that differs,
            with its stage and layer.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), lambda key, x: jnp.eye(3))
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> assert_equals_sequential(pipe, jnp.ones((8, 3)), loss_fn=jnp.mean)
    """
    if not isinstance(pipe, Pipe):
        raise TypeError(
            f"`assert_equals_sequential(pipe, x)`: a Pipe is needed, got {shown(pipe)}"
        )
    if tolerance is not None and not is_at_least(tolerance, 0):
        raise ValueError(
            f"`assert_equals_sequential(tolerance={shown(tolerance)})`: a finite "
            "number, 0 or more"
        )
    # Asked before anything runs.
    as_loss("value_and_grad", loss_fn or jnp.mean, has_aux, reduction)
    as_argnums(argnums)
    # The reference is `fpipe.sequential` at equal `chunks`, not the layers on the whole
    # batch: batch statistics and dropout masks depend on the microbatches.
    # Of a function that was split it is the function itself, as one layer.
    split = pipe.layers if isinstance(pipe.layers, Split) else None
    reference = sequential(
        [split.function] if split else pipe.layers,
        pipe.chunks,
        compute_dtype=pipe.compute_dtype,
        deferred_batch_norm=pipe.deferred_batch_norm,
    )
    if params is None:
        params = reference.init(jax.random.key(0), x, side)
    else:
        # Checked, and with arrays for Python numbers, as `Pipe.place` has it.
        params = reference.place((params,) if split else params)
    if state is None and pipe.model.stateful:
        state = reference.init_state(x, side, params)
    elif state is not None and split:
        state = (state,)
    given = {"side": side, "key": key, "train": train, "step": step}
    needs: dict[str, Any] = given | {"state": state and state[0] if split else state}
    wanted: dict[str, Any] = given | {"state": state}
    placed = pipe.place(params[0] if split else params)
    inputs = {"x": x, "side": side, "targets": targets}
    compare = _Comparison(pipe, cut_inputs(inputs, pipe.chunks).m, tolerance)

    # 1. A forward alone.
    got = pipe(placed, x, **needs)
    want = reference(params, x, **wanted)
    if state is not None:
        got, got_state = got
        want, want_state = want
        if split:
            got_state, want_state = split.state(got_state), split.state(want_state[0])
        compare.layers("the state", got_state, want_state)
    compare.tree("y", got, want)
    if loss_fn is None:
        return

    # 2. Loss and gradients. Only here forwards and backwards take turns, so the state
    # is compared once more.
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "reduction": reduction,
        "argnums": numbers,
    }
    step = pipe.value_and_grad(loss_fn, **options)
    reference_step = reference.value_and_grad(loss_fn, **options)
    got, got_gradients = step(placed, x, *targets, **needs)
    want, want_gradients = reference_step(params, x, *targets, **wanted)
    if state is not None:
        got, got_state = got
        want, want_state = want
        if split:
            got_state, want_state = split.state(got_state), split.state(want_state[0])
        compare.layers("the state of value_and_grad", got_state, want_state)
    if has_aux:
        got, got_aux = got
        want, want_aux = want
        compare.tree("aux", got_aux, want_aux)
    compare.tree("the loss", got, want)
    for number, got, want in zip(numbers, got_gradients, want_gradients, strict=True):
        if number == 0:
            # Packed or on several devices: as one entry per layer on one device.
            got = pipe.gather(got)
            if split:
                got, want = split.params(got), split.params(want[0])
            compare.layers("the gradient of params", got, want, gradients=True)
        elif number == 1:
            compare.tree("the gradient of x", got, want)
        else:
            compare.tree(f"the gradient of target {number - 2}", got, want)


def _as_wide(array: Any) -> np.ndarray:
    """The numbers of an array in float64, or complex128."""
    return np.asarray(array, complex if jnp.iscomplexobj(array) else float)


def _largest(array: Any) -> float:
    """The largest finite number, without its sign."""
    numbers = np.abs(_as_wide(array))
    return float(numbers[np.isfinite(numbers)].max(initial=0))


class _Comparison(NamedTuple):
    """Compares with the plain composition, and says where the first difference is."""

    pipe: Pipe
    microbatches: int
    tolerance: float | None

    def layers(
        self,
        title: str,
        got: Sequence[PyTree],
        want: Sequence[PyTree],
        gradients: bool = False,
    ) -> None:
        """One entry per layer; in gradients the rounding of the layer's largest number
        is no difference.
        """
        # A wrong gradient is most often one of a stage or a device, so both are named.
        schedule = self.pipe.make_schedule(self.microbatches)
        stages = [s for s, count in enumerate(self.pipe.balance) for _ in range(count)]
        for position, (layer, stage) in enumerate(
            zip(self.pipe.layers, stages, strict=True)
        ):
            device = self.pipe.devices[schedule.stage_to_device[stage]]
            place = f"layer {position} {layer.name!r} (stage {stage} on {device})"
            largest = 0.0
            if gradients:
                # The gradient of a bias before a batch norm is 0 in exact arithmetic.
                # In float32 it is the rounding of the numbers that cancelled, another
                # one in each order of summation. How large those were nobody has kept:
                # the layer's largest gradient is the guess.
                arrays = jax.tree.leaves(want[position])
                numbers = [_largest(a) for a in arrays if is_inexact(a)]
                largest = max(numbers, default=0.0)
            self.tree(f"{title}, {place}", got[position], want[position], largest)

    def tree(self, title: str, got: PyTree, want: PyTree, largest: float = 0.0) -> None:
        """Any pytree; the rounding of the number `largest` is no difference."""
        # Structure, then dtype and shape, then values: each hides the next.
        if jax.tree.structure(got) != jax.tree.structure(want):
            raise AssertionError(
                f"{title}: the pipe gives {describe(got)}, the plain composition "
                f"{describe(want)}"
            )
        named = jax.tree_util.tree_leaves_with_path(got)
        for (path, a), b in zip(named, jax.tree.leaves(want), strict=True):
            where = title + (f" at {jax.tree_util.keystr(path)}" if path else "")
            if not is_array(a) or not is_array(b):
                if a != b:
                    raise AssertionError(
                        f"{where}: the pipe gives {a!r}, the plain composition {b!r}"
                    )
            elif (a.shape, a.dtype) != (b.shape, b.dtype):
                raise AssertionError(
                    f"{where}: the pipe gives {describe(a)}, the plain composition "
                    f"{describe(b)}"
                )
            elif a.dtype != jax.dtypes.float0:
                self.array(where, a, b, largest)

    def array(self, where: str, got: Any, want: Any, largest: float) -> None:
        """One array of the same shape and dtype."""
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            # Keys have no numbers to subtract. Their bits must be equal.
            got = jax.random.key_data(got)
            want = jax.random.key_data(want)
        # Integers and keys are equal or wrong. Floats may differ by a share of the
        # array's largest number: element by element relative errors have no bound where
        # gradients of opposite signs are summed in another order.
        limit = 0.0
        if is_inexact(got):
            # With `compute_dtype=jnp.bfloat16` gradients are float32 and as coarse as
            # what they were computed in.
            low = jnp.bfloat16, jnp.float16
            used = (got.dtype, self.pipe.compute_dtype)
            low_used = [dtype for dtype in used if dtype in low]
            share = self.tolerance
            if share is None:
                share = 2e-2 if low_used else 1e-5
            eps = float(jnp.finfo(low_used[0] if low_used else got.dtype).eps)
            rounding = min(16 * eps, share) * largest
            limit = max(share * _largest(want), rounding)
        a = _as_wide(got)
        b = _as_wide(want)
        both_finite = np.isfinite(a) & np.isfinite(b)
        difference = np.where(both_finite, np.abs(a - b), 0.0)
        # What is not finite in both is no difference: it is what the model computes.
        wrong = (np.isfinite(a) != np.isfinite(b)) | (difference > limit)
        if wrong.any():
            # The largest difference is shown, and before that a number that is finite
            # in one of the two only.
            size = np.where(difference > 0, difference, np.inf)
            index = np.unravel_index(np.argmax(np.where(wrong, size, -1)), a.shape)
            raise AssertionError(
                f"{where}: {int(wrong.sum())} of {a.size} numbers differ; at "
                f"{tuple(map(int, index))} the pipe gives {a[index]:.8g}, the plain "
                f"composition {b[index]:.8g}; the largest difference is "
                f"{difference.max():.3g}, allowed is {limit:.3g}"
            )


# --- strategies ---


class _RandomLayer(NamedTuple):
    """What a random layer does; a value, so that a failing example reads well."""

    stash: tuple[str, ...]
    pop: tuple[str, ...]
    peek: tuple[str, ...]

    def __call__(self, params: Any, x: Any, **needs: Any) -> Any:
        """A bit of everything, mixed so that no order and no value can be mistaken for
        another.
        """
        # Bounded whatever comes in, so that a chain of layers does not explode.
        y = jnp.tanh(x)
        if params is not None:
            y = jnp.tanh(x @ params["w"]) + params["b"]
        if needs.get("key") is not None:
            y = y * jax.random.uniform(needs["key"], y.shape, minval=0.5)
        if needs.get("side") is not None:
            y = y + jnp.cos(needs["side"])
        if "borrowed" in needs:
            y = y @ needs["borrowed"]["layer0"]["w"].T
        returned = []
        if "carry" in needs:
            carry = needs["carry"]
            for name in self.peek:
                y = y * jnp.cos(peek(carry, name))
            for name in self.pop:
                value, carry = pop(carry, name)
                y = y - value
            for name in self.stash:
                # Names have different lengths, so two skips that change places change
                # the result.
                carry = stash(carry, name, jnp.sin(y) * len(name))
            returned.append(carry)
        if "state" in needs:
            state = needs["state"]
            y = y + state["mean"]
            # Depends on the order of the microbatches, and `y` on it: a stage that runs
            # them in another order is found. State of rows has a mean for each row.
            own = x if state["seen"].ndim else x.mean(0)
            mean = 0.5 * state["mean"] + own
            returned.append({"mean": mean, "seen": state["seen"] + x.shape[0]})
        return (y, *returned) if returned else y


def _no_parameters(key: Any, x: Any) -> None:
    """The init of a random layer without parameters."""
    del key, x


def models(width: int = 3, most: int = 6) -> "SearchStrategy[list[Layer]]":
    """A hypothesis strategy for random layers from `(rows, width)` to `(rows, width)`.

    The layers have skips between any two of them, states (one for all microbatches, or
    one entry for each row), keys, side inputs, tied weights, and parameters that are
    `None`. Side inputs have the shape of `x`, and at least one layer asks for them.

    Arguments:
        width: the width of the arrays that go from layer to layer.
        most: the largest number of layers, at least 2.
    """
    width = as_int("fpipe.testing.models", "width", width)
    most = as_int("fpipe.testing.models", "most", most, least=2)
    # Imported here, so that the assertion does not need hypothesis.
    from hypothesis import strategies as st

    def init(k: int, key: Any, x: Any) -> PyTree:
        del x
        return {
            "w": jax.random.normal(key, (width, width)),
            "b": jnp.full((width,), 0.1 * k),
        }

    def init_state(x: Any) -> PyTree:
        return {"mean": jnp.zeros((width,), x.dtype), "seen": jnp.int32(0)}

    def init_rows(x: Any) -> PyTree:
        # Another number in each row, so that no two can change places.
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
        mean = jnp.cos(rows.astype(x.dtype))[:, None] * jnp.ones((1, width), x.dtype)
        return {"mean": mean, "seen": rows}

    def layer(
        k: int, function: _RandomLayer, needs: set[str], bare: bool, by_row: bool
    ) -> Layer:
        stateful = "state" in needs
        return Layer(
            function,
            _no_parameters if bare else functools.partial(init, k),
            f"layer{k}",
            *function,
            needs=sorted(needs),
            borrow=("layer0",) if "borrowed" in needs else (),
            init_state=(init_rows if by_row else init_state) if stateful else None,
            state_rows=by_row if stateful else None,
        )

    @st.composite
    def draw_layers(draw: "DrawFn") -> list[Layer]:
        count = draw(st.integers(2, most))
        stashes: list[list[str]] = [[] for _ in range(count)]
        pops: list[list[str]] = [[] for _ in range(count)]
        peeks: list[list[str]] = [[] for _ in range(count)]
        # Each skip goes from one layer to a later one, and may be peeked at between.
        for n in range(draw(st.integers(0, 4))):
            first = draw(st.integers(0, count - 2))
            last = draw(st.integers(first + 1, count - 1))
            name = "s" * (n + 1)
            stashes[first].append(name)
            pops[last].append(name)
            for k in range(first + 1, last):
                if draw(st.booleans()):
                    peeks[k].append(name)
        layers = []
        # A call that gives side inputs needs a layer that asks for them.
        asking = draw(st.integers(0, count - 1))
        for k in range(count):
            choices = ["key", "side", "state"]
            if k:
                choices.append("borrowed")
            needs = draw(st.sets(st.sampled_from(choices), max_size=2))
            if k == asking:
                needs = needs | {"side"}
            if stashes[k] or pops[k] or peeks[k]:
                needs = needs | {"carry"}
            function = _RandomLayer(tuple(stashes[k]), tuple(pops[k]), tuple(peeks[k]))
            # The first layer owns what others borrow.
            bare = k > 0 and draw(st.integers(0, 3)) == 3
            by_row = "state" in needs and draw(st.booleans())
            layers.append(layer(k, function, needs, bare, by_row))
        return layers

    return draw_layers()


def schedules(
    stage_to_device: Sequence[int],
    microbatches: int,
    split: bool = False,
    in_order: bool = True,
    recompute: bool = False,
    offload: bool = False,
) -> "SearchStrategy[Schedule]":
    """A hypothesis strategy for random valid schedules.

    A schedule has the actions in any order in which all of them can run.

    Arguments:
        stage_to_device: the device of each stage.
        microbatches: the number of microbatches.
        split: whether backwards are cut into `I` and `W`.
        in_order: whether each stage runs its forwards in the order of the microbatches.
            Layers with state need that.
        recompute: whether some microbatches have an `R` on some stages.
        offload: whether some microbatches have an `O` and an `L` on some stages.
    """
    from hypothesis import strategies as st

    call = "fpipe.testing.schedules"
    microbatches = as_int(call, "microbatches", microbatches)
    split, in_order = as_bool(call, "split", split), as_bool(call, "in_order", in_order)
    recompute = as_bool(call, "recompute", recompute)
    offload = as_bool(call, "offload", offload)
    if not isinstance(stage_to_device, Sequence) or not all(
        type(device) is int and device >= 0 for device in stage_to_device
    ):
        raise TypeError(
            f"`{call}(stage_to_device={shown(stage_to_device)})`: the device of each "
            "stage, ints from 0"
        )

    def draw_actions(rng: Any) -> list[Action]:
        """The actions of a schedule, in no order."""
        actions: list[Action] = []
        for stage in range(len(stage_to_device)):
            for i in range(microbatches):
                kinds: tuple[Kind, ...] = ("F", "I", "W") if split else ("F", "B")
                if recompute and rng.randrange(2):
                    kinds = (*kinds, "R")
                if offload and rng.randrange(2):
                    kinds = (*kinds, "O", "L")
                actions += [Action(kind, stage, i) for kind in kinds]
        return actions

    @st.composite
    def draw_schedule(draw: "DrawFn") -> Schedule:
        # One seed, and not a draw for each action, which hypothesis would record and
        # shrink one by one.
        rng = draw(st.randoms(use_true_random=False))
        left = draw_actions(rng)
        # The rules of a schedule, and on top of them the order that state asks for. Any
        # order in which each action follows those that it waits for is a valid
        # schedule.
        present = set(left)
        waits_for = {action: needed_actions(action, present) for action in left}
        if in_order:
            for action, others in waits_for.items():
                if action.kind == "F" and action.microbatch:
                    others.append(action._replace(microbatch=action.microbatch - 1))
        rows: list[list[Action]] = [[] for _ in range(1 + max(stage_to_device))]
        done = set[Action]()
        while left:
            # One global order, cut into one row for each device: it is a proof that the
            # rows cannot wait for each other in a cycle.
            ready = [action for action in left if done.issuperset(waits_for[action])]
            chosen = ready[rng.randrange(len(ready))]
            rows[stage_to_device[chosen.stage]].append(chosen)
            left.remove(chosen)
            done.add(chosen)
        return Schedule(
            actions=tuple(map(tuple, rows)), stage_to_device=tuple(stage_to_device)
        )

    return draw_schedule()


def partitions(
    layers: Sequence[Layer],
    x: PyTree,
    executor: str = "placed",
    devices: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
) -> "SearchStrategy[Pipe]":
    """A hypothesis strategy for random pipes over given layers.

    It draws balance, devices, chunks, checkpoint mode, a named or random schedule,
    `recompute` and `offload`. Over a mesh it draws no devices, and there are as many
    stages as the axis `"stage"` is long. It draws `unshard` then.

    Arguments:
        layers: as for `Pipe`; over a mesh at least one for each stage.
        x: an input, or its shapes. Its rows limit the number of microbatches. Over a
            mesh with an axis `"data"` they must be a multiple of its size.
        executor: as for `Pipe`.
        devices: the devices to choose from. Default: all of `jax.devices()`.
        mesh: as for `Pipe`, in place of `devices`.
    """
    from hypothesis import strategies as st

    # Refused here, before anything is drawn: layers, executor, devices, and an input
    # that cannot be cut.
    count = len(list(layers))
    stages = 1 if mesh is None else dict(mesh.shape).get("stage", 1)
    even = [1] * (stages - 1) + [count - stages + 1]
    Pipe(layers, even, devices, executor=executor, mesh=mesh)
    cut = cut_inputs({"x": x}, 1)
    # Where nothing is cut there are as many microbatches as there are.
    rows = sum(cut.rows) or cut.m
    choice = list(jax.devices() if devices is None else devices)
    modes = [
        "always",
        "except_last",
        "never",
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    ]
    scan = executor == "scan"
    chunk_counts = list(range(1, rows + 1)) if cut.rows else [cut.m]
    if mesh is not None:
        shared = dict(mesh.shape).get("data", 1)
        # Rows that cannot be shared are refused by the first call.
        chunk_counts = [
            chunks
            for chunks in chunk_counts
            for of in [cut_inputs({"x": x}, chunks)]
            if all(size % shared == 0 for size in of.rows or of.row_counts)
        ] or chunk_counts[:1]
    # Four stages at most: they have every kind of boundary, from the first stage,
    # between inner ones, and to the last.
    most_cuts = min(3, count - 1, len(choice) - 1)

    @st.composite
    def draw_pipe(draw: "DrawFn") -> Pipe:
        fewest, most = (0, most_cuts) if mesh is None else (stages - 1, stages - 1)
        drawn = st.sets(st.integers(1, count - 1), min_size=fewest, max_size=most)
        cuts = sorted(draw(drawn if most else st.just(())))
        balance = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        chunks = draw(st.sampled_from(chunk_counts))
        places: dict[str, Any]
        if mesh is not None:
            places = {"mesh": mesh, "unshard": draw(st.sampled_from(UNSHARD))}
        elif scan:
            # A mesh holds each device once; the placed executor also takes repeats.
            places = {"devices": choice[: len(balance)]}
        else:
            places = {"devices": [draw(st.sampled_from(choice)) for _ in balance]}
        names = ["gpipe", "1f1b", "eager_1f1b", "zb_h1", None]
        schedule: Any = draw(st.sampled_from(names))
        if schedule is None:
            m = cut_inputs({"x": x}, chunks).m
            split = draw(st.booleans())
            more = draw(st.booleans())
            random = schedules(
                range(len(balance)), m, split, recompute=more, offload=more
            )
            fixed = draw(random)
            # Construction asks with `chunks`, a call with the number of pieces.
            schedule = fixed if m == chunks else "gpipe"
        pipe = Pipe(
            layers,
            balance,
            chunks=chunks,
            checkpoint=draw(st.sampled_from(modes)),
            schedule=schedule,
            executor=executor,
            recompute=draw(st.sampled_from(EXPLICIT_RECOMPUTE)),
            **places,
        )
        # Of a random schedule what is copied is drawn with it.
        copies = isinstance(schedule, str) and draw(st.booleans())
        return _within_least_limit(pipe, cut_inputs({"x": x}, chunks).m, copies)

    return draw_pipe()


def _within_least_limit(pipe: Pipe, microbatches: int, copies: bool) -> Pipe:
    """A pipe that copies to the host as much as it can, or the given one."""
    for limit in range(1, microbatches + 1) if copies else ():
        limited = dataclasses.replace(pipe, offload=limit)
        with contextlib.suppress(ValueError):
            limited.make_schedule(microbatches)
            return limited
    return pipe
