"""`Pipe`: a model cut into stages on devices, run by a schedule."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax

from fpipe._call import Args, Call, Result, check_chunks, check_params
from fpipe._loss import Loss
from fpipe._microbatch import first_microbatch
from fpipe._model import Model
from fpipe._placed import Placed, only_shapes
from fpipe._placement import Device, Place, Placement, as_placements, first_placements
from fpipe._plan import Layout
from fpipe._remat import Mode, Policy, Remat
from fpipe._scheduling import Scheduling
from fpipe._sequential import Sequential
from fpipe._stage import cut_stages
from fpipe._tree import PyTree, numbers_as_arrays, pack
from fpipe.schedules import Schedule


@dataclasses.dataclass(frozen=True, init=False)
class Pipe(Call):
    """A sequence of layers, cut into stages that live on devices, run microbatch by microbatch.

    A frozen value: it compares, hashes, copies and pickles; nothing to close. At equal `chunks` it computes what
    `fpipe.sequential` computes.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        balance: layers per stage; default as even as possible over the devices.
        devices: one per stage (one per device of the schedule, if that puts several stages on each), a `jax.Device`
            or a `Sharding` of one device; repeats and any order are allowed, extra ones ignored. Default
            `jax.devices()`.
        chunks: the number of microbatches asked for; default 1.

    Other Arguments:
        checkpoint: what a backward recomputes: `"always"`, `"except_last"` (default: all but the last
            microbatch), `"never"`, or a policy of `jax.checkpoint_policies`.
        schedule: `"gpipe"`, `"1f1b"`, `"eager_1f1b"` (default), a `Schedule`, or a function
            `f(devices, microbatches) -> Schedule`; it is called once with `chunks` microbatches to learn where the
            stages are, and again whenever a batch gives another number.
        executor: `"placed"`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was given and what would be right.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jax.random.normal(key, (3, 3)))
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> loss, grads = pipe.value_and_grad(lambda y, t: jnp.mean((y - t) ** 2))(params, x, x)
        >>> jax.tree.map(jnp.shape, grads)
        ((3, 3), (3, 3))
    """

    model: Model
    balance: tuple[int, ...]
    placements: tuple[Placement, ...]
    chunks: int
    remat: Remat
    scheduling: Scheduling
    executor: str
    _placed: ClassVar[Placed]  # set on each instance, but no field: no part of the value

    def __init__(
        self,
        layers: Iterable[Any],
        balance: Sequence[int] | None = None,
        devices: Iterable[Place] | None = None,
        chunks: int = 1,
        checkpoint: Mode | Policy = "except_last",
        schedule: str | Schedule | Callable[[int, int], Schedule] = "eager_1f1b",
        executor: str = "placed",
    ) -> None:
        if executor == "scan":
            raise NotImplementedError('`Pipe(executor="scan")` is not in this release; the executor is "placed"')
        if executor != "placed":
            raise ValueError(f'`Pipe(executor={executor!r})`: the executor is "placed"')
        model, scheduling, chunks = Model(layers), Scheduling.of(schedule), check_chunks("Pipe", chunks)
        places = as_placements(devices)
        balance = _checked_balance(balance, model, scheduling.stages(len(places), chunks))
        stage_to_device = scheduling.stage_to_device(len(balance), len(places), chunks)
        fields = {
            "model": model,
            "balance": balance,
            "placements": first_placements(places, 1 + max(stage_to_device)),
            "chunks": chunks,
            "remat": Remat.of(checkpoint),
            "scheduling": scheduling,
            "executor": executor,
        }
        self.__setstate__(fields)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        # Compiled programs sit in here, outside the value: not pickled, not compared.
        stage_to_device = self.scheduling.stage_to_device(len(self.balance), len(self.placements), self.chunks)
        layout = Layout(cut_stages(self.model, self.balance), tuple(self.placements[d] for d in stage_to_device))
        placed = Placed(layout, self.scheduling, stage_to_device, self.remat, self.chunks)
        object.__setattr__(self, "_placed", placed)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def layers(self) -> tuple[Any, ...]:
        """The flattened layers."""
        return self.model.layers

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the schedule, in its order."""
        return tuple(p.device for p in self.placements)

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule for that many microbatches."""
        return self._placed.schedule(microbatches)

    # --- parameters and state ---

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> tuple[PyTree, ...]:
        """Parameters of every layer, made on the layer's device.

        Arguments:
            key: a PRNG key; layer `l` gets `fold_in(key, l)`.
            x, side: inputs as for a call, or their shapes.

        Returns:
            A tuple with one entry per layer.

        Raises:
            ValueError: a layer without `init`, or one that borrows from a later layer.
        """
        return self.model.init(key, *first_microbatch(x, side, self.chunks), self._make)

    def init_state(self, x: PyTree, side: PyTree = None, params: Sequence[PyTree] | None = None) -> tuple[PyTree, ...]:
        """State of every layer (`None` for a layer without), made on the layer's device.

        Arguments:
            x, side: inputs as for a call, or their shapes.
            params: needed if some layer has no `init`: then the shapes cannot be told without them.
        """
        return self.model.init_state(*first_microbatch(x, side, self.chunks), params, self._make)

    def _make(self, layer: int, make: Callable[[], PyTree]) -> PyTree:
        place = self._placed.layout.home(layer)
        with jax.default_device(place.device):
            return _put(make(), place)

    def place(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """Put the parameters of each layer on its device. The structure stays; Python numbers become arrays.

        Raises:
            ValueError: not one entry per layer.
        """
        check_params(self.model, params, "`place(params)`")
        return tuple(_put(numbers_as_arrays(p), self._placed.layout.home(k)) for k, p in enumerate(params))

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The exact inverse of `place`: the parameters as for the plain composition, on the first device.

        Raises:
            ValueError: not one entry per layer.
        """
        check_params(self.model, params, "`gather(params)`")
        return tuple(_put(p, self.placements[0]) for p in params)

    # --- calls ---

    def _forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        if only_shapes(args):
            return self._reference()._forward(args)
        return self._placed.forward(args)

    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        if only_shapes(args):
            return self._reference()._loss(args, loss, argnums)
        return self._placed.loss(args, loss, argnums)

    def _reference(self) -> Sequential:
        return Sequential(self.model, self.chunks)


def _checked_balance(balance: Any, model: Model, stages: int) -> tuple[int, ...]:
    """Layers per stage, each at least one, all of them; by default as even as possible over `stages`."""
    count = len(model.layers)
    if balance is None:
        stages = min(stages, count)
        return tuple(count // stages + (s < count % stages) for s in range(stages))
    call = f"`Pipe(balance={balance!r})`"
    if isinstance(balance, (str, bytes)) or not isinstance(balance, Iterable):
        raise TypeError(f"{call}: a sequence of layers per stage is needed, such as [{count}]")
    given = list(balance)
    try:
        counts = tuple(operator.index(b) for b in given if not isinstance(b, bool))
    except TypeError:
        counts = ()
    if len(counts) < len(given):
        raise TypeError(f"{call}: layers per stage are ints")
    if not counts or min(counts) < 1:
        raise ValueError(f"{call}: every stage has at least one layer")
    if sum(counts) != count:
        raise ValueError(f"{call}: that is {sum(counts)} layers, but the model has {count}")
    return counts


def _put(tree: PyTree, place: Placement) -> PyTree:
    arrays, spec = pack(tree)
    return spec.unpack(place.put(arrays))
