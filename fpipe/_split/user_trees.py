"""A call's trees as the user has them, and as the layers of a pipe take them.

In: what a user gives to a call. Out: the same for the layers, and what these return as
the user has it. Of layers these are the same trees. Of a function that was split, such
as `f(params, x)` with the parameters `{"enc": w0, "dec": w1}` and two pieces,

    the user's                      the layers'
    ------------------------------  ---------------------------------------------
    {"enc": w0, "dec": w1}          ((w0,), (w1,))
    x {"ids": a, "labels": b}       {"ids": a, "labels": Elsewhere()}
    side None                       StraightInputs(None, {"ids": …, "labels": b})
    gradients {"enc": …, "dec": …}  ((…,), (…,))
    state {"mean": a}               (None, (a,))
    frozen {"enc": True, …}         ((True,), (False,))

A `Pipe` asks here for all of it, and does not know which of the two it runs.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, pack
from fpipe._executors.call import Args, Result
from fpipe._executors.placement import Placement
from fpipe._executors.scan.packing import Packed
from fpipe._model.batch_norm import deferred
from fpipe._model.frozen import Frozen
from fpipe._model.function_layers import model_of, params_by_layer, state_by_layer
from fpipe._model.init import Put, init_params, init_state
from fpipe._model.layer import Layer
from fpipe._model.microbatch import CallShapes
from fpipe._model.model import Model
from fpipe._model.needs import call_needs
from fpipe._model.stages import SIDE, Leaf, X
from fpipe._model.straight import StraightInputs, arrays_in_place, rejoined
from fpipe._planning.costs import LayerCosts
from fpipe._split.init import Init, TracedInit, make_state
from fpipe._split.split import Split


def trees_of(
    layers: Iterable[Any], compute_dtype: Any, deferred_batch_norm: bool, chunks: int
) -> "UserTrees":
    """The adapter between a user of layers, or of a function that was split, and the
    layers.

    Arguments:
        layers, compute_dtype, deferred_batch_norm, chunks: as for `Pipe`; all but the
            layers are checked.

    Raises:
        TypeError, ValueError: no such layers.
    """
    listed = layers if isinstance(layers, (tuple, list)) else ()
    if any(isinstance(layer, Split) for layer in listed):
        raise TypeError(
            "`Pipe([split, ...])`: a function that was split takes the place of all "
            "layers: write `Pipe(split)`, and make what comes before or after it a "
            "part of the function"
        )
    model = model_of(layers, compute_dtype)
    if isinstance(layers, Split):
        if deferred_batch_norm:
            raise ValueError(
                "`Pipe(split, deferred_batch_norm=True)`: a function that was split "
                "has no layers of batch norm: give layers to `Pipe`"
            )
        return FunctionTrees(model, layers, compute_dtype, chunks)
    # As they were given: `dataclasses.replace` defers them again.
    given = model.layers
    if deferred_batch_norm:
        model = Model(deferred(given, "Pipe"), compute_dtype)
    return UserTrees(model, given)


@dataclasses.dataclass(frozen=True)
class UserTrees:
    """Of layers: they take the user's trees as these are.

    Attributes:
        model: the layers, as they run.
        layers: as the user has them.
    """

    model: Model
    layers: tuple[Layer, ...] | Split

    # --- before there is a call ---

    @property
    def known_params(self) -> Sequence[PyTree] | None:
        """Shapes of the parameters, one entry per layer, where these are known."""
        return None

    def known_costs(self) -> LayerCosts | None:
        """What layers cost, where it is known without a batch."""
        return None

    def sample(self, x: PyTree, side: PyTree) -> tuple[PyTree, PyTree]:
        """A sample of a batch, and of side inputs; `None`: not given."""
        return x, side

    def check_places(self, homes: Sequence[Placement]) -> None:
        """Check that parameters fit the places of their layers, as far as it is
        known how they are cut.

        Raises:
            ValueError: they do not.
        """
        del homes

    # --- from the user to the layers ---

    def params(self, params: Any) -> Any:
        """Parameters of a call."""
        return params

    def state(self, state: PyTree) -> PyTree:
        """The state of a call; `None`: not given."""
        return state

    def frozen(self, frozen: Frozen | None) -> Frozen | None:
        """What is frozen."""
        return frozen

    def args(self, args: Args) -> Args:
        """The arguments of a call."""
        return args

    def inputs(
        self, x: PyTree, needs: Mapping[str, PyTree]
    ) -> tuple[PyTree, Mapping[str, PyTree]]:
        """The batch and the needs of a call."""
        return x, needs

    def asked(
        self, args: Args, argnums: tuple[int, ...]
    ) -> tuple[Args, tuple[int, ...]]:
        """The arguments of a call with a loss that the layers take, and the numbers of
        those whose gradients it asks for.

        Arguments:
            argnums: as the user counts them.
        """
        return args, argnums

    def planned(self, args: Args) -> Args:
        """The arguments of a call that is planned, or their shapes: parameters may be
        packed, or `None`, and a state may be missing.
        """
        return args._replace(params=_shapes_of_packed(args.params))

    # --- from the layers to the user ---

    def own_params(self, params: Any) -> Any:
        """The inverse of `params`; gradients too."""
        return params

    def own_state(self, states: Sequence[PyTree]) -> PyTree:
        """The inverse of `state`."""
        return states

    def own_result(self, result: Result, argnums: Sequence[int]) -> Result:
        """What a call with a loss gives."""
        del argnums
        return result

    # --- what the user's functions make ---

    def init(self, key: Any, x: PyTree, needs: Mapping[str, Any], put: Put) -> PyTree:
        """Parameters, made where they live.

        Arguments:
            x, needs: shapes of a microbatch.
            put: `put(layer, make, key)` runs `make(key)` where a layer lives.

        Raises:
            TypeError, ValueError: nothing makes them.
        """
        return init_params(self.model, key, x, needs, put)

    def init_state(
        self, key: Any, shapes: CallShapes, params: Sequence[PyTree] | None, put: Put
    ) -> PyTree:
        """State, made where it lives.

        Arguments:
            params: one entry per layer, or `None`.

        Raises:
            TypeError, ValueError: nothing makes it.
        """
        batches = shapes.whole, shapes.ready
        first = shapes.first
        return init_state(self.model, *first, params, key, put, *batches)


@dataclasses.dataclass(frozen=True)
class FunctionTrees(UserTrees):
    """Of a function that was split: they are the function's own.

    Attributes:
        compute_dtype, chunks: as for `Pipe`.
    """

    layers: Split
    compute_dtype: Any
    chunks: int

    @property
    def split(self) -> Split:
        """The function's pieces."""
        return self.layers

    @property
    def known_params(self) -> Sequence[PyTree] | None:
        return self.split.params(self.split.param_shapes)

    def known_costs(self) -> LayerCosts | None:
        return self.split.estimated_costs()

    def sample(self, x: PyTree, side: PyTree) -> tuple[PyTree, PyTree]:
        if x is None:
            return x, side
        x, needs = self.inputs(x, call_needs(side=side))
        return x, needs["side"]

    def check_places(self, homes: Sequence[Placement]) -> None:
        self.split.check_places(homes)

    def params(self, params: Any) -> Any:
        if isinstance(params, Packed):
            return params.by_layer
        return self.split.params(params)

    def state(self, state: PyTree) -> PyTree:
        if state is None and self.model.stateful:
            raise ValueError(
                "`fpipe.Pipe(split)`: the function that was split has state: pass "
                "`state=`, its own tree; the call returns the new state"
            )
        return state_by_layer(self.split, state)

    def frozen(self, frozen: Frozen | None) -> Frozen | None:
        return None if frozen is None else self.split.frozen(frozen)

    def args(self, args: Args) -> Args:
        x, needs = self.inputs(args.x, args.needs)
        return args._replace(
            params=self.params(args.params),
            x=x,
            needs=needs,
            state=self.state(args.state),
        )

    def inputs(
        self, x: PyTree, needs: Mapping[str, PyTree]
    ) -> tuple[PyTree, Mapping[str, PyTree]]:
        return self.split.inputs(x, needs, self.chunks, self.compute_dtype)

    def asked(
        self, args: Args, argnums: tuple[int, ...]
    ) -> tuple[Args, tuple[int, ...]]:
        side = args.needs["side"]
        if 1 not in argnums or not isinstance(side, StraightInputs):
            return args, argnums
        # Of the side inputs the part that is the user's `x`, and what is in both parts
        # of that once.
        frozen = {Leaf(SIDE, n) for n in range(len(pack(side.side)[0]))}
        straight = arrays_in_place(side.x)
        for k, n in enumerate(arrays_in_place(args.x)):
            if n in straight:
                frozen.add(Leaf(X, k))
        args = args._replace(frozen=args.frozen | frozen)
        return args, (*argnums, len(args.numbered))

    def planned(self, args: Args) -> Args:
        params = args.params
        if isinstance(params, Packed):
            params = _shapes_of_packed(params)
        else:
            params = params_by_layer(self.split, params)
        x, needs = self.inputs(args.x, args.needs)
        state = state_by_layer(self.split, args.state)
        return args._replace(params=params, x=x, needs=needs, state=state)

    def own_params(self, params: Any) -> Any:
        if not isinstance(params, Packed):
            return self.split.tree(params)
        packing = params.packing.shown_as(self.split.own_tree)
        return Packed(params.arrays, packing, params.absent)

    def own_state(self, states: Sequence[PyTree]) -> PyTree:
        return self.split.state_tree(states)

    def own_result(self, result: Result, argnums: Sequence[int]) -> Result:
        # What `asked` adds is the last one.
        found = dict(zip(argnums, result.gradients, strict=False))
        if 0 in found:
            found[0] = self.own_params(found[0])
        if len(result.gradients) > len(argnums):
            found[1] = rejoined(found[1], result.gradients[-1])
        state = self.own_state(result.state)
        return result._replace(gradients=tuple(found.values()), state=state)

    def init(self, key: Any, x: PyTree, needs: Mapping[str, Any], put: Put) -> PyTree:
        if self.split.function.init is None:
            raise TypeError(
                "`pipe.init(key, x)`: the function that was split makes no parameters: "
                "make them yourself, and write `pipe.place(params)`, or split "
                "`fpipe.Layer(fn, init)`"
            )
        return self.init_by(Init.of_layer(self.split.function, key, x, needs), put)

    def init_by(self, init: Init, put: Put) -> PyTree:
        """Parameters as an init function makes them."""
        traces: dict[Any, TracedInit] = {}

        # Traced where it runs, for a trace holds the mesh of its context: in most pipes
        # there is none, and this is one trace.
        def make(k: int, key: Any) -> PyTree:
            mesh = jax.sharding.get_abstract_mesh()
            if mesh not in traces:
                traces[mesh] = init.traced(self.split.params)
            return traces[mesh].make(k, key)

        pieces = range(len(self.split))
        made = [put(k, functools.partial(make, k), init.key) for k in pieces]
        return self.split.tree(made)

    def init_state(
        self, key: Any, shapes: CallShapes, params: Sequence[PyTree] | None, put: Put
    ) -> PyTree:
        del params  # The function's are known.
        function = self.split.function
        if function.init_state is None:
            raise TypeError(
                "`pipe.init_state(x)`: the function that was split makes no state: "
                "make it yourself, and give it to calls, or split "
                "`fpipe.Layer(fn, init_state=...)`"
            )
        batches = shapes.whole, shapes.ready
        made = make_state(function, self.split, key, *shapes.first, put, *batches)
        return self.own_state(made)


def _shapes_of_packed(params: Any) -> Any:
    """Packed parameters as shapes, one entry per layer; others as they are."""
    return params.packing.whole if isinstance(params, Packed) else params
