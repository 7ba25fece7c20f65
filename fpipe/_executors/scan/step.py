"""One kind of call as functions of flat arrays: inputs cut and packed, the machine run,
outputs put together.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import PyTree, Shape, is_inexact, pack
from fpipe._executors.programs import Inputs, Request
from fpipe._executors.scan.clock import Clock
from fpipe._executors.scan.feeds import share
from fpipe._executors.scan.interpreter import Runner
from fpipe._executors.scan.machine import Machine
from fpipe._executors.scan.mesh import AXIS, DATA, by_stage
from fpipe._executors.scan.storage import is_key
from fpipe._model.loss import divided, wide
from fpipe._model.model import Model
from fpipe._model.stages import AUX, LOSS, SIDE, TARGETS, WEIGHT, Leaf, Port, X, Y


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A call's program.

    Attributes:
        out: the shapes of what the last unit returns, for one microbatch.
        idle, clock: see `Runner`.
    """

    machine: Machine
    mesh: Mesh
    inputs: Inputs
    request: Request
    model: Model
    out: Mapping[Port, Shape]
    idle: float = 0.0
    clock: Clock | None = None

    @cached_property
    def clocked(self) -> "Step":
        """The same, telling a clock."""
        return dataclasses.replace(self, clock=Clock())

    @property
    def m(self) -> int:
        """The number of microbatches."""
        return self.machine.microbatches

    @cached_property
    def rows(self) -> int:
        """Rows of a microbatch."""
        columns = self.inputs.cut.columns
        return columns[0][0] if columns else 1

    @cached_property
    def runner(self) -> Runner:
        """What runs the machine."""
        return Runner(self.machine, self.mesh, self.rows, self.idle, self.clock)

    # --- what is jitted, once ---

    @cached_property
    def forward(self) -> Any:
        """`f(params, state, given) -> (y, state, left)`: arrays of `y` and of the
        states; `left` is for the backward.
        """
        return jax.jit(self._forward)

    @cached_property
    def backward(self) -> Any:
        """`f(params, state, given, left, cotangents) -> gradients`."""
        return jax.jit(self._backward)

    @cached_property
    def loss(self) -> Any:
        """`f(params, state, given) -> (loss, aux, state, gradients)`."""
        return jax.jit(self._loss)

    def _forward(
        self,
        params: Sequence[Any],
        state: Sequence[Any],
        given: Mapping[Port, Sequence[Any]],
    ) -> Any:
        outputs, _, rows, left = self.runner(
            0, params, self._packed(state), self._pieces(given)
        )
        y = [_joined(outputs[Leaf(Y, k)]) for k in range(len(self.out[Y].leaves))]
        return (
            y,
            self._states(rows),
            [left[name] for name in self.runner.left if name in left],
        )

    def _backward(
        self,
        params: Sequence[Any],
        state: Sequence[Any],
        given: Mapping[Port, Sequence[Any]],
        left: Sequence[Any],
        cotangents: Sequence[Any],
    ) -> list[Any]:
        pieces = self._pieces(given)
        shapes = self.out[Y].leaves
        pieces[Port("y")] = [
            c.reshape(self.m, *a.shape) if is_inexact(a) else c
            for c, a in zip(cotangents, shapes, strict=True)
        ]
        carried = dict(zip(self.runner.left, left, strict=True))
        outputs, gradients, _, _ = self.runner(
            1, params, self._packed(state), pieces, carried
        )
        return self._gradients(outputs, gradients, None)

    def _loss(
        self,
        params: Sequence[Any],
        state: Sequence[Any],
        given: Mapping[Port, Sequence[Any]],
    ) -> Any:
        outputs, gradients, rows, _ = self.runner(
            0, params, self._packed(state), self._pieces(given)
        )
        loss = self.request.loss
        assert loss is not None
        values, weight = outputs[Leaf(LOSS, 0)], None
        total = jnp.sum(
            wide(values) * (1 / self.m if loss.reduction == "mean" else 1.0), 0
        )
        if loss.reduction == "weighted":
            weight = jnp.sum(wide(outputs[Leaf(WEIGHT, 0)]), 0)
            total = divided(total, weight)
        aux = [outputs[Leaf(AUX, k)] for k in range(len(self.out[AUX].leaves))]
        return (
            total.astype(values.dtype),
            aux,
            self._states(rows),
            self._gradients(outputs, gradients, weight),
        )

    # --- parts ---

    def _pieces(self, given: Mapping[Port, Sequence[Any]]) -> dict[Port, list[Any]]:
        """Inputs with a first axis of microbatches, those that lie over the devices
        with one that these divide; what goes whole stays.
        """
        out: dict[Port, list[Any]] = {}
        for port, arrays in given.items():
            cut = (
                getattr(self.inputs.cut, port.kind).rows
                if port in (X, SIDE, TARGETS)
                else [None] * len(arrays)
            )
            out[port] = [
                a
                if rows is None
                else self._sharded(
                    a.reshape(self.m, rows[0], *a.shape[1:]),
                    Leaf(port, k) in self.machine.spread,
                )
                for k, (a, rows) in enumerate(zip(arrays, cut, strict=True))
            ]
        return out

    def _sharded(self, array: Any, spread: bool) -> Any:
        """Every microbatch's rows over the data axis, if the mesh has one. Without this
        a microbatch, rows that follow each other, would be on one shard of the batch
        alone.

        Arguments:
            spread: the microbatches lie over the stages' devices.
        """
        size = self.mesh.shape.get(DATA, 1)
        data = (
            None if size == 1 or array.shape[1] % size or is_key(array.dtype) else DATA
        )
        if spread:
            devices = self.machine.devices
            missing = share(self.m, devices) * devices - self.m
            array = (
                jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
                if missing
                else array
            )
        elif data is None:
            return array
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(self.mesh, P(AXIS if spread else None, data))
        )

    def _packed(self, state: Sequence[Any]) -> list[Any] | None:
        packing = self.machine.state
        return None if packing is None else list(packing.pack(packing.trees(state)))

    def _states(self, rows: Sequence[Any]) -> list[Any]:
        """The arrays of the finished states."""
        packing = self.machine.state
        if packing is None:
            return []
        trees = packing.trees([packing.take(rows, entry) for entry in packing.entries])
        return pack(tuple(self._finished(dict(enumerate(trees))).values()))[0]

    def _finished(self, states: dict[int, PyTree]) -> dict[int, PyTree]:
        own = self.model.finish({k: states[k] for k in self.model.stateful})
        return {k: own.get(k) for k in states}

    @cached_property
    def state_shape(self) -> Shape | None:
        """The finished states."""
        packing = self.machine.state
        if packing is None:
            return None
        return Shape.of(
            jax.eval_shape(
                lambda s: tuple(self._finished(dict(enumerate(s))).values()),
                packing.trees([packing.shape(e) for e in packing.entries]),
            )
        )

    @cached_property
    def gradient_names(self) -> list[int | Leaf]:
        """What a backward returns: rows, and leaves of inputs. A leaf that nothing
        depends on is not there.
        """
        params, leaves = self.machine.params, sorted(self.request.wanted, key=str)
        rows = {
            params.where[leaf.port.of, leaf.k][0]
            for leaf in leaves
            if leaf.port.kind == "params"
        }
        made = [
            leaf
            for leaf in leaves
            if tuple(leaf) in self.machine.inputs or leaf in self.machine.outputs
        ]
        return [*sorted(rows), *(leaf for leaf in made if leaf.port.kind != "params")]

    def _gradients(
        self, outputs: Mapping[Any, Any], found: Mapping[Any, Any], weight: Any
    ) -> list[Any]:
        """Gradients in the order of `gradient_names`, in their own dtype."""

        def finish(a: Any, dtype: Any) -> Any:
            return (a if weight is None else divided(wide(a), weight)).astype(dtype)

        out = []
        for name in self.gradient_names:
            if isinstance(name, int):
                out.append(
                    finish(self._row(name, found), self.machine.params.rows[name].dtype)
                )
                continue
            shape = self.inputs.of(name.port).leaves[name.k]
            whole = tuple(name) in self.machine.inputs
            made = (
                found["input", tuple(name)]
                if whole
                else outputs[name].reshape(shape.shape)
            )
            out.append(finish(made, shape.dtype))
        return out

    def _row(self, row: int, found: Mapping[Any, Any]) -> Any:
        if ("row", row) in found:
            return found["row", row]
        shape = (self.mesh.shape[AXIS], *self.machine.params.rows[row].shape)
        return jax.lax.with_sharding_constraint(jnp.zeros(shape), by_stage(self.mesh))


def _joined(array: Any) -> Any:
    """The microbatches' outputs as one: concatenated on axis 0, 0-d ones stacked."""
    return array if array.ndim == 1 else array.reshape(-1, *array.shape[2:])
