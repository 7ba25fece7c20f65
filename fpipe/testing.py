"""For tests of your own pipelines: a pipe against the plain composition, and random
models, partitions and schedules.

The strategies need hypothesis; the assertion does not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import PyTree, describe, is_array, is_inexact, pack
from fpipe._executors.sequential import sequential
from fpipe._model.layer import Layer
from fpipe._model.loss import Reduction
from fpipe._model.microbatch import first_microbatch, pieces
from fpipe._model.skips import peek, pop, stash
from fpipe._pipe import Pipe
from fpipe.schedules import Action, Kind, Schedule

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy


def assert_equals_sequential(
    pipe: Pipe,
    x: PyTree,
    *targets: PyTree,
    loss_fn: Callable[..., Any] | None = None,
    params: Sequence[PyTree] | None = None,
    side: PyTree = None,
    key: Any = None,
    state: Sequence[PyTree] | None = None,
    train: bool = False,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    argnums: int | Sequence[int] = (0, 1),
    tolerance: float | None = None,
) -> None:
    """Check that a pipe computes what `fpipe.sequential` computes, at equal `chunks`.

    Compared are the output and the new state, and with `loss_fn` the loss, aux and
    gradients: structure, shapes and dtypes first, then values.

    Arguments:
        pipe: either executor.
        x, targets, side, key, state, train: as for a call. Without `state`, layers with
            state get what `init_state` makes.
        loss_fn, has_aux, reduction, argnums: as for `pipe.value_and_grad`.
        params: one entry per layer, as for the plain composition; default what `init`
            makes from `jax.random.key(0)`.
        tolerance: the largest difference of an array, as a share of its largest number:
            `max|a - b| <= tolerance * max|b|`. Default 1e-5, and 2e-2 where 16-bit
            floats are computed in. Where an array of gradients is a small difference of
            large numbers, compare in float64 (`with jax.enable_x64(True):`) rather than
            with a large tolerance. Gradients that are nothing but rounding (of a bias
            before a batch norm, of the keys' bias in attention) are no difference: 16
            roundings of the largest number among the gradients of the layer's
            parameters, or `tolerance` of it if that is less.

    Raises:
        AssertionError: it names the first array that differs, with its stage and layer.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jax.random.normal(key, (3, 3)))
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> assert_equals_sequential(pipe, jnp.ones((8, 3)), loss_fn=lambda y: jnp.mean(y**2))
    """
    reference = sequential(
        pipe.layers,
        pipe.chunks,
        compute_dtype=pipe.compute_dtype,
        deferred_batch_norm=pipe.deferred_batch_norm,
    )
    params = (
        reference.init(jax.random.key(0), x, side)
        if params is None
        else reference.place(params)
    )
    if state is None and pipe.model.stateful:
        state = reference.init_state(x, side, params)
    needs: dict[str, Any] = {"side": side, "key": key, "state": state, "train": train}
    placed = pipe.place(params)
    compare = _Comparison(pipe, len(pieces(_rows(x), pipe.chunks)), tolerance)

    got, want = pipe(placed, x, **needs), reference(params, x, **needs)
    if state is not None:
        compare.layers("the state", got[1], want[1])
        got, want = got[0], want[0]
    compare.tree("y", got, want)
    if loss_fn is None:
        return
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "reduction": reduction,
        "argnums": numbers,
    }
    got, gradients = pipe.value_and_grad(loss_fn, **options)(
        placed, x, *targets, **needs
    )
    want, others = reference.value_and_grad(loss_fn, **options)(
        params, x, *targets, **needs
    )
    if state is not None:
        compare.layers("the state of value_and_grad", got[1], want[1])
        got, want = got[0], want[0]
    if has_aux:
        compare.tree("aux", got[1], want[1])
        got, want = got[0], want[0]
    compare.tree("the loss", got, want)
    for n, a, b in zip(numbers, gradients, others, strict=True):
        if n == 0:
            compare.layers("the gradient of params", pipe.gather(a), b, gradients=True)
        else:
            compare.tree(
                "the gradient of x" if n == 1 else f"the gradient of target {n - 2}",
                a,
                b,
            )


def _rows(x: PyTree) -> int:
    return next(a.shape[0] for a in pack(x)[0] if a.shape)


def _largest(array: Any) -> float:
    """The largest finite number, without its sign."""
    numbers = np.abs(
        np.asarray(array, np.complex128 if jnp.iscomplexobj(array) else np.float64)
    )
    return float(numbers[np.isfinite(numbers)].max(initial=0))


class _Comparison(NamedTuple):
    """Compares with the plain composition, and says where the first difference is."""

    pipe: Pipe
    microbatches: int
    tolerance: float | None

    def layers(
        self,
        what: str,
        got: Sequence[PyTree],
        want: Sequence[PyTree],
        gradients: bool = False,
    ) -> None:
        """One entry per layer; in gradients the rounding of the layer's largest number
        is no difference.
        """
        stages = [s for s, count in enumerate(self.pipe.balance) for _ in range(count)]
        where = self.pipe.make_schedule(self.microbatches).stage_to_device
        for k, layer in enumerate(self.pipe.layers):
            place = f"layer {k} {layer.name!r} (stage {stages[k]} on {self.pipe.devices[where[stages[k]]]})"
            numbers = [
                _largest(a)
                for a in jax.tree.leaves(want[k])
                if gradients and is_inexact(a)
            ]
            self.tree(f"{what}, {place}", got[k], want[k], max(numbers, default=0.0))

    def tree(self, what: str, got: PyTree, want: PyTree, beside: float = 0.0) -> None:
        """Any pytree; the rounding of the number `beside` is no difference."""
        if jax.tree.structure(got) != jax.tree.structure(want):
            raise AssertionError(
                f"{what}: the pipe gives {describe(got)}, the plain composition "
                f"{describe(want)}"
            )
        others = jax.tree.leaves(want)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), others, strict=True
        ):
            where = what + (f" at {jax.tree_util.keystr(path)}" if path else "")
            if not is_array(a) or not is_array(b):
                if a != b:
                    raise AssertionError(
                        f"{where}: the pipe gives {a!r}, the plain composition {b!r}"
                    )
                continue
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise AssertionError(
                    f"{where}: the pipe gives {describe(a)}, the plain composition "
                    f"{describe(b)}"
                )
            if a.dtype != jax.dtypes.float0:
                self._values(where, a, b, beside)

    def _values(self, where: str, a: Any, b: Any, beside: float) -> None:
        low = [
            d
            for d in (a.dtype, self.pipe.compute_dtype)
            if d in (jnp.bfloat16, jnp.float16)
        ]
        share = self.tolerance
        if share is None:
            share = 2e-2 if low else 1e-5
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        exact = not jnp.issubdtype(a.dtype, jnp.inexact)
        rounding = (
            0.0 if exact else 16 * float(jnp.finfo(low[0] if low else a.dtype).eps)
        )
        a, b = (
            np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64)
            for v in (a, b)
        )
        wrong = np.isfinite(a) != np.isfinite(b)
        off = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), 0.0)
        limit = (
            0.0 if exact else max(share * _largest(b), min(rounding, share) * beside)
        )
        wrong |= off > limit
        if wrong.any():
            at = np.unravel_index(
                np.argmax(np.where(wrong, np.where(off > 0, off, np.inf), -1)), a.shape
            )
            raise AssertionError(
                f"{where}: {int(wrong.sum())} of {a.size} numbers differ; at "
                f"{tuple(map(int, at))} the pipe gives {a[at]:.8g}, "
                f"the plain composition {b[at]:.8g}; the largest difference is "
                f"{off.max():.3g}, allowed is {limit:.3g}"
            )


# --- strategies ---


class _Random(NamedTuple):
    """What a random layer does; a value, so that a failing example reads well."""

    stash: tuple[str, ...]
    pop: tuple[str, ...]
    peek: tuple[str, ...]

    def __call__(self, params: Any, x: Any, **needs: Any) -> Any:
        """A bit of everything, mixed so that no order and no value can be mistaken for
        another.
        """
        y = jnp.tanh(x @ params["w"]) + params["b"]
        if needs.get("key") is not None:
            y = y * jax.random.uniform(needs["key"], y.shape, minval=0.5)
        if needs.get("side") is not None:
            y = y + jnp.cos(needs["side"])
        if "borrowed" in needs:
            y = y @ needs["borrowed"]["layer0"]["w"].T
        out = []
        if "carry" in needs:
            carry = needs["carry"]
            for name in self.peek:
                y = y * jnp.cos(peek(carry, name))
            for name in self.pop:
                value, carry = pop(carry, name)
                y = y - value
            for name in self.stash:
                carry = stash(carry, name, jnp.sin(y) * len(name))
            out.append(carry)
        if "state" in needs:
            state = needs["state"]
            y = y + state["mean"]
            out.append(
                {
                    "mean": 0.5 * state["mean"] + x.mean(0),
                    "seen": state["seen"] + x.shape[0],
                }
            )
        return (y, *out) if out else y


def models(width: int = 3, most: int = 6) -> "SearchStrategy[list[Layer]]":
    """Random layers from `(rows, width)` to `(rows, width)`: skips between any two of
    them, states, keys, side inputs (of the shape of `x`) and tied weights.

    Arguments:
        width: of what goes from layer to layer.
        most: layers at most; at least 2.
    """
    from hypothesis import strategies as st

    def init(k: int, key: Any, x: Any) -> PyTree:
        del x
        return {
            "w": jax.random.normal(key, (width, width)),
            "b": jnp.full((width,), 0.1 * k),
        }

    def init_state(x: Any) -> PyTree:
        return {"mean": jnp.zeros((width,), x.dtype), "seen": jnp.int32(0)}

    def layer(k: int, does: _Random, needs: set[str]) -> Layer:
        return Layer(
            does,
            functools.partial(init, k),
            f"layer{k}",
            *does,
            needs=sorted(needs),
            borrow=("layer0",) if "borrowed" in needs else (),
            init_state=init_state if "state" in needs else None,
        )

    @st.composite
    def made(draw: "DrawFn") -> list[Layer]:
        count = draw(st.integers(2, most))
        ends: list[tuple[list[str], list[str], list[str]]] = [
            ([], [], []) for _ in range(count)
        ]
        for n in range(draw(st.integers(0, 4))):
            a = draw(st.integers(0, count - 2))
            b = draw(st.integers(a + 1, count - 1))
            name = "s" * (n + 1)
            ends[a][0].append(name)
            ends[b][1].append(name)
            for k in range(a + 1, b):
                if draw(st.booleans()):
                    ends[k][2].append(name)
        layers = []
        for k, own in enumerate(ends):
            needs = draw(
                st.sets(
                    st.sampled_from(
                        ["key", "side", "state", *(["borrowed"] if k else [])]
                    ),
                    max_size=2,
                )
            )
            needs = needs | {"carry"} if any(own) else needs
            layers.append(layer(k, _Random(*map(tuple, own)), needs))
        return layers

    return made()


def schedules(
    stage_to_device: Sequence[int],
    microbatches: int,
    split: bool = False,
    in_order: bool = True,
) -> "SearchStrategy[Schedule]":
    """Random valid schedules: any order in which everything can run.

    Arguments:
        stage_to_device: the map.
        microbatches: how many.
        split: whether backwards are cut into `I` and `W`.
        in_order: whether each stage's forwards keep the order of the microbatches, as
            layers with state need.
    """
    from hypothesis import strategies as st

    devices, stages = 1 + max(stage_to_device), len(stage_to_device)
    back: Kind = "I" if split else "B"

    def needed(a: Action) -> list[Action]:
        out = []
        if a.kind == "F":
            out += [Action("F", a.stage - 1, a.microbatch)] if a.stage else []
            out += (
                [Action("F", a.stage, a.microbatch - 1)]
                if in_order and a.microbatch
                else []
            )
        elif a.kind == back:
            out.append(Action("F", a.stage, a.microbatch))
            out += (
                [Action(back, a.stage + 1, a.microbatch)]
                if a.stage < stages - 1
                else []
            )
        else:
            out.append(Action("I", a.stage, a.microbatch))
        return out

    @st.composite
    def made(draw: "DrawFn") -> Schedule:
        rng, done = draw(st.randoms(use_true_random=False)), set[Action]()
        kinds: tuple[Kind, ...] = ("F", "I", "W") if split else ("F", "B")
        left = [
            Action(kind, s, i)
            for s in range(stages)
            for i in range(microbatches)
            for kind in kinds
        ]
        rows: list[list[Action]] = [[] for _ in range(devices)]
        while left:
            ready = [a for a in left if done.issuperset(needed(a))]
            chosen = ready[rng.randrange(len(ready))]
            rows[stage_to_device[chosen.stage]].append(chosen)
            left.remove(chosen)
            done.add(chosen)
        return Schedule(
            actions=tuple(map(tuple, rows)), stage_to_device=tuple(stage_to_device)
        )

    return made()


def partitions(
    layers: Sequence[Layer],
    x: PyTree,
    executor: str = "placed",
    devices: Sequence[Any] | None = None,
) -> "SearchStrategy[Pipe]":
    """Random pipes over given layers: balance, devices, chunks, checkpoint mode and
    schedule, named or random.

    Arguments:
        layers: as for `Pipe`.
        x: an input, or its shapes: it decides how many microbatches there are.
        executor: as for `Pipe`; for `"scan"` chunks divide the rows.
        devices: to choose from; default all.
    """
    from hypothesis import strategies as st

    rows, count = _rows(x), len(layers)
    choice = list(jax.devices() if devices is None else devices)
    modes = [
        "always",
        "except_last",
        "never",
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ]
    first_microbatch(x, {}, 1)  # an input that cannot be cut is refused here

    @st.composite
    def made(draw: "DrawFn") -> Pipe:
        cuts = sorted(
            draw(
                st.sets(
                    st.integers(1, count - 1),
                    max_size=min(3, count - 1, len(choice) - 1),
                )
            )
        )
        balance = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        scan = executor == "scan"
        chunks = draw(
            st.sampled_from(
                [n for n in range(1, rows + 1) if not scan or rows % n == 0]
            )
        )
        own = (
            choice[: len(balance)]
            if scan
            else [draw(st.sampled_from(choice)) for _ in balance]
        )
        schedule: Any = draw(
            st.sampled_from(["gpipe", "1f1b", "eager_1f1b", "zb_h1", None])
        )
        if schedule is None:
            m = len(pieces(rows, chunks))
            fixed = draw(schedules(range(len(balance)), m, split=draw(st.booleans())))
            # Construction asks with `chunks`, a call with the number of pieces.
            schedule = {m: fixed}.get(chunks, "gpipe")
        return Pipe(
            layers,
            balance,
            own,
            chunks=chunks,
            checkpoint=draw(st.sampled_from(modes)),
            schedule=schedule,
            executor=executor,
        )

    return made()
