"""What the code of an operation makes, on one device.

In: an operation and the arrays that it reads. Out: the values of its code. Three things
may be other than in the code as it stands:

    a sum over rows      made as parts, one for each shard of the rows (`row_sums.py`)
    rows too few         every device of a stage computes all of them
    an axis that moves   gathered before, where an exchange would hang (`whole_axes.py`)
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from fpipe._executors.scan.machine import Add, Op, SummedGradient
from fpipe._executors.scan.mesh import waits_for_all
from fpipe._executors.scan.reading import cut_apart
from fpipe._executors.scan.storage import as_stored, from_stored
from fpipe._executors.scan.summing import GradientSums
from fpipe._executors.stage_places import AXIS
from fpipe._model.specs import without_axes
from fpipe._program.control_flow import has_own_devices
from fpipe._program.graph import Bind, bind
from fpipe._program.host_calls import Failures, Logged
from fpipe._program.row_sums import RowSum, sum_rows_apart, values_read
from fpipe._program.whole_axes import WholeAxes

Array: TypeAlias = jax.Array


class Computer:
    """Runs the code of operations.

    Arguments:
        sums: the gradients that the operations add to.
        failures: where exceptions of layers' callbacks wait.
    """

    def __init__(self, sums: GradientSums, failures: Failures | Logged | None) -> None:
        self.sums = sums
        self.failures = failures
        self.mesh = sums.mesh
        self.data = sums.data
        self.shards = sums.shards
        # The axes that are left to XLA.
        self._free = {n: s for n, s in self.mesh.shape.items() if n != AXIS}

    def compute(self, op: Op, arrays: Sequence[Array]) -> list[Any]:
        """What an operation's code makes: arrays, or constants of Python. A gradient
        that is kept as parts comes as these parts, and not as the sum over rows. If a
        gradient is scattered, each device has its piece.
        """
        code = op.code
        assert code is not None
        parts: dict[int, RowSum] = {}
        alone: list[int] = []
        scattered: dict[int, SummedGradient] = {}
        for target in op.targets:
            if not isinstance(target, Add):
                continue
            gradient, n = target.buffer, target.value - len(op.sources)
            if self.sums.is_scattered(gradient):
                scattered[n] = gradient
            if op in self.sums.parts.get(gradient, {}):
                parts[n] = self.sums.parts[gradient][op]
            elif self.sums.has_parts(gradient):
                alone.append(n)
        # `terms` are the values that the sums are made of. They are asked for beside
        # the outputs. Nobody reads the sums over all rows then, so XLA leaves them out.
        wanted = [*code.outs, *code.sums]
        terms = list(dict.fromkeys(v for p in parts.values() for v in values_read(p)))
        made = self._values(op, arrays, [*wanted, *terms])
        given = dict(zip(terms, made[len(wanted) :], strict=True))
        values = made[: len(wanted)]
        for n, own in parts.items():
            values[n] = sum_rows_apart(own, given, self.data)
            if n in scattered:
                values[n] = self.sums.added_up(scattered[n], values[n])
        for n in alone:
            values[n] = _first_part(values[n], self.shards)
        for n, gradient in scattered.items():
            spec = self.sums.spec_of(gradient)
            apart = cut_apart(spec, self.data)
            if n not in parts or apart != spec:
                # Each device has the sum over all rows, and adds its piece of it.
                whole = without_axes(apart, self.data)
                values[n] = jax.lax.with_sharding_constraint(values[n], whole)
        return values

    def _values(
        self, op: Op, arrays: Sequence[Array], wanted: Sequence[int]
    ) -> list[Any]:
        """Values of an operation's code.

        If devices cannot share the rows of its microbatch, each computes all of it.
        XLA would use the idle axes to cut other axes of arrays, in several ways, and
        exchange parts between these.
        """
        code, taken = op.code, frozenset(self.data)
        assert code is not None
        is_idle = (
            op.rows % self.shards > 0
            and self._free.keys() > taken
            and not code.on_host
            and not has_own_devices(code.nodes)
        )
        if not is_idle:
            return code.values(arrays, wanted, self.failures, bind=self._bind())

        def alone(numbers: Sequence[Array]) -> list[Array]:
            own = [
                from_stored(a, like) for a, like in zip(numbers, arrays, strict=True)
            ]
            made = code.values(own, wanted, self.failures, bind=self._bind(taken))
            return [as_stored(jnp.asarray(a)) for a in made]

        run = jax.shard_map(
            alone, in_specs=P(), out_specs=P(), axis_names=taken, check_vma=False
        )
        made = run([as_stored(a) for a in arrays])
        avals = [code.graph.avals[v] for v in wanted]
        return [from_stored(a, like) for a, like in zip(made, avals, strict=True)]

    def _bind(self, taken: frozenset[str] = frozenset()) -> Bind:
        """How equations are run.

        Arguments:
            taken: axes that a `shard_map` around them has taken.
        """
        if not taken and not waits_for_all(self.mesh):
            return bind
        left = self._free.keys() - taken
        return WholeAxes(tuple(self._free[name] for name in sorted(left)), taken)


def _first_part(value: Array, parts: int) -> Array:
    """A sum as parts: the first part is the sum, all others are zero."""
    first = jax.lax.broadcasted_iota(jnp.int32, (parts, *value.shape), 0) == 0
    return jnp.where(first, value[None], jnp.zeros_like(value))
