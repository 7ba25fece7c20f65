"""How a pipe's call runs: by the executor, or in one of the ways around it.

In: a call's `Args`, by layer. Out: what the executor returns. The ways, from the
outside to the inside:

    jax.eval_shape of a placed pipe    the plain composition, which can be traced
    detect_anomaly                     the detector, which runs a changed model
    jax.disable_jit                    `Eager`, one operation after the other
    jax.debug_nans, and a NaN          the executor, then `Eager` to find the operation
    otherwise                          the executor
"""

import dataclasses

from fpipe._core.pytrees import PyTree, is_traced
from fpipe._executors.anomaly import Detector
from fpipe._executors.call import Args, Result
from fpipe._executors.eager import Eager, without_jit
from fpipe._executors.not_finite import NotFiniteError
from fpipe._executors.protocol import Executor
from fpipe._executors.sequential import PlainExecutor
from fpipe._executors.tracers import TracedCallError, only_shapes
from fpipe._model.loss import Loss


@dataclasses.dataclass(frozen=True)
class Runner:
    """What runs the calls of a pipe.

    Attributes:
        executor: the pipe's executor. With a detector it runs the detector's model.
        plain: the plain composition of the user's own layers.
        eager: the plain composition of the layers that the executor runs.
        detector: the detector of anomalies, if the pipe has one.
    """

    executor: Executor
    plain: PlainExecutor
    eager: Eager
    detector: Detector | None

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, states)` of a call without a loss."""
        try:
            if self.detector is not None:
                return self.detector.forward(self._forward, args)
            return self._forward(args)
        except TracedCallError:
            # `jax.eval_shape` traces as `jax.jit` does, and a placed pipe cannot be
            # traced. But shapes are those of the plain composition, which can.
            if only_shapes():
                return self.plain.forward(args)
            raise

    def _forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """A forward, which keeps residuals only if it is being differentiated.

        Under `jax.grad` the arguments are tracers. Then residuals are kept for a
        pull-back.
        """
        if without_jit():
            return self.eager.forward(args)
        try:
            if is_traced(args):
                return self.executor.differentiable(args)
            return self.executor.forward(args)
        except NotFiniteError:
            # The layers one by one, in which JAX finds the operation.
            self.eager.forward(args)
            raise

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """A call with a loss, its gradients by `argnums`; `()` is the loss alone."""
        try:
            if self.detector is not None:
                return self.detector.loss(self._loss, args, loss, argnums)
            return self._loss(args, loss, argnums)
        except TracedCallError:
            if only_shapes():
                return self.plain.loss(args, loss, argnums)
            raise

    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        if without_jit():
            return self.eager.loss(args, loss, argnums)
        try:
            return self.executor.loss(args, loss, argnums)
        except NotFiniteError:
            self.eager.loss(args, loss, argnums)
            raise
