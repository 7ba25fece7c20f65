"""A call under `jax.disable_jit`: layer after layer, operation by operation.

In: a call's `Args`, with parameters as the executor has placed them. Out: what the
executor would return, from the plain composition on the first device. In between a
layer's Python runs once for each microbatch and sees values, so that `print` and a
debugger work in it:

    parameters   stage 0 on cpu:0, stage 1 on cpu:1   ->  all on cpu:0
    the call     `PlainExecutor`, one microbatch after the other
    gradients    all on cpu:0                         ->  each where its parameter is

Nothing is scheduled and nothing compiled. The first device needs room for the model.
"""

import dataclasses

import jax

from fpipe._core.pytrees import PyTree
from fpipe._core.settings import checked
from fpipe._executors.call import Args, Result
from fpipe._executors.protocol import Executor
from fpipe._executors.recording import recorders_of
from fpipe._executors.sequential import PlainExecutor
from fpipe._model.loss import Loss


def without_jit() -> bool:
    """Whether the caller is under `jax.disable_jit`."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Eager:
    """The calls of an executor, run by the plain composition.

    Attributes:
        executor: where parameters are, and where results belong.
        plain: the layers that the executor runs.
    """

    executor: Executor
    plain: PlainExecutor

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`, which JAX can transform in any way."""
        with checked():
            y, state = self.plain.forward(self._collected(args))
        return self.executor.deliver(y), self.executor.deliver_state(state)

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        with checked():
            result = self.plain.loss(self._collected(args), loss, argnums)
        gradients = tuple(
            g if n else self.executor.spread(g, args.params)
            for n, g in zip(argnums, result.gradients, strict=True)
        )
        return Result(
            self.executor.tell(result.loss),
            self.executor.tell(result.aux),
            self.executor.deliver_state(result.state),
            gradients,
        )

    def _collected(self, args: Args) -> Args:
        """The call with everything on the first device."""
        if recorders_of(self.executor.owner):
            raise ValueError(
                "`fpipe.record(pipe)`: the call is under `jax.disable_jit`, where the "
                "layers run one by one and no program is dispatched; record it outside"
            )
        collect = self.executor.collect
        state = args.state
        if state is not None:
            state = self.executor.gather_state(state)
        moved = {name: collect(tree) for name, tree in args.inputs.items()}
        # If parameters are traced, `gather` does not move them: the compiler decides
        # where they are.
        params = tuple(map(collect, self.executor.gather(args.params)))
        return args._replace(params=params, state=state).with_inputs(moved)
