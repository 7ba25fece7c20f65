"""The parameters of a pipe as an NNX module, for `nnx.Optimizer` and `nnx.jit`.

    params of the pipe        ({"w": w}, {"n": 3 as an int32 array})
    state of the module       {"_arrays": {"[0]['w']": nnx.Param(w),
                                           "[1]['n']": nnx.Variable(n)}}

An NNX optimizer sees only the `nnx.Param`s. Its transformation makes the pipe's
parameters from them, calls optax, and converts the updates back.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from fpipe._core.pytrees import PyTree, eval_shape, is_array, is_inexact, pack


class Parameters(nnx.Module):
    """The parameters of a pipe, placed or packed, as an NNX module.

    Each array is an `nnx.Param` under its path in the parameters, and stays on its
    device. Integers cannot be trained; they are `nnx.Variable`s. `nnx.Optimizer` works
    on this module with either executor. With `executor="scan"` the step may be inside
    `nnx.jit`.

    Arguments:
        params: parameters from `pipe.init` or `pipe.place`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> layers = fpipe.flax.layers([nnx.Linear(3, 3, rngs=nnx.Rngs(0))] * 2)
        >>> pipe = fpipe.Pipe(layers, executor="scan")
        >>> x = jnp.ones((8, 3))
        >>> model = fpipe.flax.Parameters(pipe.init(jax.random.key(0), x))
        >>> adam = model.transformation(optax.adam(1e-3))
        >>> optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
        >>> value_and_grad = pipe.value_and_grad(lambda y, t: jnp.mean((y - t) ** 2))
        >>> @nnx.jit
        ... def step(model, optimizer, x, target):
        ...     loss, grads = value_and_grad(model.params, x, target)
        ...     optimizer.update(model, model.gradients(grads))
        ...     return loss
        >>> loss = step(model, optimizer, x, x)
    """

    def __init__(self, params: PyTree) -> None:
        # A flat dict by path: it fits the tuple that the placed executor has as well as
        # the `Packed` of the scan executor.
        arrays, self._spec = pack(params)
        self._paths = _paths(params)
        self._arrays = nnx.Dict(
            {
                path: nnx.Param(a) if is_inexact(a) else nnx.Variable(a)
                for path, a in zip(self._paths, arrays, strict=True)
            }
        )

    @property
    def params(self) -> PyTree:
        """The parameters in the form that the pipe takes."""
        return self._spec.unpack(
            [self._arrays[path].get_value() for path in self._paths]
        )

    def gradients(self, grads: PyTree) -> nnx.State:
        """The pipe's gradients in the form of `nnx.Optimizer.update(model, ...)`.

        Arguments:
            grads: gradients from `pipe.value_and_grad`.

        Returns:
            An `nnx.State`, without the gradients of integers.

        Raises:
            ValueError: `grads` are not the gradients of these parameters.
        """
        # Gradients have the structure of the parameters, so equal paths mean equal
        # places.
        paths = _paths(grads)
        if paths != self._paths:
            wrong = sorted(set(paths) ^ set(self._paths))
            raise ValueError(
                "`fpipe.flax.Parameters.gradients(grads)`: gradients and parameters "
                f"differ in {wrong or 'their order'}; give it what "
                "`pipe.value_and_grad` returns for `model.params`"
            )
        arrays = zip(paths, pack(grads)[0], strict=True)
        return _state({path: nnx.Param(a) for path, a in arrays if self._trained(path)})

    def transformation(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """An optax transformation for `nnx.Optimizer(model, …, wrt=nnx.Param)`.

        It shows the parameters to `tx` in the form of the pipe.

        Arguments:
            tx: any optax transformation, or `fpipe.optim.per_stage(tx)`. The text of
                `per_stage` says which transformations need it.

        Returns:
            An `optax.GradientTransformationExtraArgs`.
        """
        # `tx` gets the whole parameters with their structure, because masks by path
        # and `fpipe.optim` depend on it. NNX shows only trained parameters, in its own
        # form of a state:
        #     seen by NNX     {"_arrays": {"[0]['w']": w}}
        #     given to `tx`   ({"w": w}, {"n": n})
        tx = optax.with_extra_args_support(tx)
        shapes = eval_shape(tx.init, self.params)
        state_paths = _paths(shapes)
        state_spec = pack(shapes)[1]

        def as_tree(seen: Any, untrained: Callable[[str], Any]) -> PyTree:
            """The trained arrays that NNX sees and the others, in the pipe's form."""
            trained = {path: nnx.as_pure(a) for path, a in _arrays(seen).items()}
            return self._spec.unpack(
                [
                    trained[path] if self._trained(path) else untrained(path)
                    for path in self._paths
                ]
            )

        def params_tree(params: Any) -> PyTree:
            return as_tree(params, lambda path: self._arrays[path].get_value())

        def by_path(state: PyTree) -> dict[str, Any]:
            return dict(zip(_paths(state), pack(state)[0], strict=True))

        def init(params: Any) -> dict[str, Any]:
            return by_path(tx.init(params_tree(params)))

        def update(
            updates: Any, state: Any, params: Any = None, **extra: Any
        ) -> tuple[Any, dict[str, Any]]:
            grads = as_tree(updates, lambda path: np.zeros((), jax.dtypes.float0))
            old_state = state_spec.unpack([state[path] for path in state_paths])
            tree = None if params is None else params_tree(params)
            new_updates, new_state = tx.update(grads, old_state, tree, **extra)
            arrays = dict(zip(self._paths, pack(new_updates)[0], strict=True))
            seen = _state({path: arrays[path] for path in _arrays(updates)})
            return seen, by_path(new_state)

        return optax.GradientTransformationExtraArgs(init, update)

    def _trained(self, path: str) -> bool:
        return isinstance(self._arrays[path], nnx.Param)


# A state of NNX has no names for what is empty, so `_arrays` may be missing there.


def _state(arrays: dict[str, Any]) -> nnx.State:
    """Arrays by path as NNX holds them: `{"_arrays": {path: array}}`."""
    return nnx.State({"_arrays": arrays} if arrays else {})


def _arrays(state: Any) -> Any:
    """The arrays by path in a state of NNX: the inverse of `_state`."""
    return state.get("_arrays", {})


def _paths(tree: PyTree) -> tuple[str, ...]:
    """The names of the arrays of a pytree, in their order."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(jax.tree_util.keystr(path) for path, leaf in named if is_array(leaf))
