"""Layers that are the pieces of one function.

A user who splits a function keeps its own trees of parameters and state, and its layers
have one entry each. For a function with the parameters `{"enc": w0, "dec": w1}` and two
pieces

    params({"enc": w0, "dec": w1})     ((w0,), (w1,))     what the layers take
    tree(((w0,), (w1,)))               the inverse

Who takes layers (`Pipe`, `tune`, `layer_costs`) takes these as well, and goes by what
is said here. `fpipe.split` makes them.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fpipe._core.pytrees import PyTree, Spec
from fpipe._model.layer import Layer
from fpipe._model.model import Model


@dataclasses.dataclass(frozen=True)
class OwnTree:
    """How the parameters of all layers are the function's own tree, placed.

    Attributes:
        spec: the structure of the tree.
        places: of each array of it the layer, and its number among the layer's arrays.
    """

    spec: Spec
    places: tuple[tuple[int, int], ...]


class FunctionLayers(Sequence[Layer], abc.ABC):
    """A sequence of layers that knows the function that they are the pieces of."""

    @property
    @abc.abstractmethod
    def param_shapes(self) -> PyTree:
        """The function's parameters, as shapes."""

    @abc.abstractmethod
    def params(self, tree: PyTree) -> tuple[PyTree, ...]:
        """The function's parameters as its layers take them."""

    @abc.abstractmethod
    def tree(self, params: Sequence[PyTree]) -> PyTree:
        """The inverse of `params`."""

    @property
    @abc.abstractmethod
    def own_tree(self) -> OwnTree:
        """What `tree` makes."""

    @property
    @abc.abstractmethod
    def state_shapes(self) -> PyTree:
        """The function's state, as shapes."""

    @abc.abstractmethod
    def state(self, tree: PyTree) -> tuple[PyTree, ...]:
        """The function's state as its layers take it."""

    @abc.abstractmethod
    def state_tree(self, states: Sequence[PyTree]) -> PyTree:
        """The inverse of `state`."""

    @abc.abstractmethod
    def layers_in(self, dtype: Any) -> tuple[Layer, ...]:
        """The layers of the function computed in a dtype, which take `inputs`.

        Arguments:
            dtype: `None`: its own.
        """

    @abc.abstractmethod
    def inputs(
        self, x: PyTree, needs: Mapping[str, PyTree], chunks: int, dtype: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """The batch and the needs of a call as `layers_in(dtype)` take them."""

    @abc.abstractmethod
    def estimated_work(
        self, x: PyTree, needs: Mapping[str, Any]
    ) -> tuple[tuple[float, float], ...]:
        """What each layer takes in a step that trains, forward and backward, estimated
        from the function's trace: in FLOPs of a large matrix product.

        Arguments:
            x, needs: shapes of a microbatch, as `layers_in` take them.
        """


def model_of(layers: Iterable[Any], compute_dtype: Any) -> Model:
    """The model of layers, or of a function's pieces.

    Arguments:
        compute_dtype: as for `Model`, already checked. A function casts what enters by
            itself; what crosses a cut keeps its dtype, so that cuts change nothing.
    """
    if isinstance(layers, FunctionLayers):
        own = layers.layers_in(compute_dtype)
        return Model(own, one_key=True, estimate=layers.estimated_work)
    return Model(layers, compute_dtype)


def params_by_layer(layers: Iterable[Any], params: Any) -> Any:
    """Parameters, or their shapes, with one entry per layer: those of a function are
    known, and may be left out.

    Arguments:
        params: `None`: not given.
    """
    if not isinstance(layers, FunctionLayers):
        return params
    return layers.params(layers.param_shapes if params is None else params)


def inputs_by_layer(
    layers: Iterable[Any],
    x: PyTree,
    needs: Mapping[str, PyTree],
    chunks: int,
    dtype: Any,
) -> tuple[PyTree, Mapping[str, PyTree]]:
    """The batch and the needs of a call as the layers of `model_of` take them.

    Arguments:
        dtype: what the model computes in.

    Raises:
        TypeError, ValueError: they cannot be cut; side inputs that nobody asks for.
    """
    if not isinstance(layers, FunctionLayers):
        return x, needs
    return layers.inputs(x, needs, chunks, dtype)


def state_by_layer(layers: Iterable[Any], state: Any) -> Any:
    """A state, or its shapes, with one entry per layer; that of a function is its own
    tree.

    Arguments:
        state: `None`: not given.
    """
    if state is None or not isinstance(layers, FunctionLayers):
        return state
    return layers.state(state)
