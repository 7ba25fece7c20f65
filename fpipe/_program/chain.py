"""Several programs as one: they run one after the other in one launch.

In: functions under `jax.jit`, and which arrays each takes. Out: one such function. What
one of them makes for the next never becomes an array, and XLA compiles both together.

The forward and the backward of a last stage, `y = x @ w` with a loss:

    Chain(
        calls=(fpipe_F, fpipe_B),
        takes=((0, 1, 2), (0, 1, 5, 3)),     arguments 0 to 3: w, x, target, sum of w
        counts=(2, 2),                       F makes 4 and 5: the loss, a residual
        returns=(4, 6, 7),                   B makes 6 and 7: gradient of x, sum of w
        donates=(3,),
        name="F_B",
        results=(),
    )

The residual, value 5, is not returned.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from fpipe._core.settings import donated


@dataclasses.dataclass(frozen=True)
class Chain:
    """Programs that run one after the other.

    Equal chains compute the same, because equal codes have one function.

    Attributes:
        calls: the programs.
        takes: for each of them the numbers of what it takes. The arguments of the chain
            have the first numbers; after them come the results of each program.
        counts: how many results each has.
        returns: the numbers of what the chain returns.
        donates: the arguments that it consumes.
        name: for profiles.
        results: over a mesh how each result lies, `None` where XLA decides; empty on
            one device.
    """

    calls: tuple[Callable[..., Sequence[Any]], ...]
    takes: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    returns: tuple[int, ...]
    donates: tuple[int, ...]
    name: str
    results: tuple[Sharding | None, ...] = ()

    def compile(self) -> Callable[..., Sequence[Any]]:
        """The function under `jax.jit`."""
        # What is below `jit`: XLA sees the equations of all, and no calls.
        functions = [getattr(call, "__wrapped__", call) for call in self.calls]

        def call(*arrays: Any) -> list[Any]:
            values = list(arrays)
            for function, takes, count in zip(
                functions, self.takes, self.counts, strict=True
            ):
                made = function(*(values[n] for n in takes))
                assert len(made) == count
                values += made
            return [values[n] for n in self.returns]

        call.__name__ = call.__qualname__ = f"fpipe_{self.name}"
        options: dict[str, Any] = {}
        if self.results:
            options["out_shardings"] = list(self.results)
        return jax.jit(call, donate_argnums=donated(self.donates), **options)
