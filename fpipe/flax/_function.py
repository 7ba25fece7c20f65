"""The common part of linen and NNX layers: the user's options, and the function of
the layer.

    fpipe.flax.layer(nn.BatchNorm(), train="not frozen")
        -> ModuleOptions(name="BatchNorm", train="not frozen")
        -> LinenFunction(name="BatchNorm", …)                   a ModuleFunction
        -> fpipe.Layer(apply=LinenFunction(…), needs=("state", "key", "train"), …)
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fpipe._core.pytrees import PyTree, describe
from fpipe._model.layer import Layer
from fpipe.flax._borrow import Borrow, lend
from fpipe.flax._calling import Calling, find_calling
from fpipe.flax._places import Place

# The part of a module's result that is the layer's output: its entry under an index or
# a name, or a function of it. `None` is the whole result.
Output: TypeAlias = int | str | Callable[[Any], PyTree] | None


@dataclasses.dataclass(frozen=True)
class ModuleOptions:
    """A user's options for one module; see `fpipe.flax.layer`.

    Attributes:
        chained: whether the module is in a Flax `Sequential`.
        places: the places of its variables in those of the whole model, if the user
            gives them.
    """

    name: str
    x: PyTree = None
    side_sample: PyTree = None
    carry_sample: Mapping[str, PyTree] | None = None
    inputs: str | Iterable[str] | None = None
    side: Mapping[str, str] | None = None
    output: Output = None
    rngs: Iterable[str] | None = None
    state: Iterable[str] | None = None
    train: str | bool | None = None
    method: str | Callable[..., Any] | None = None
    borrow: tuple[Borrow, ...] = ()
    chained: bool = False
    state_rows: bool | None = None
    places: tuple[Place, ...] = ()

    @property
    def call(self) -> str:
        """Where the options come from, for errors."""
        return f"`fpipe.flax.layer(module)` of layer {self.name!r}"

    def find_calling(
        self, method: Callable[..., Any], fields: Mapping[str, Any]
    ) -> Calling:
        """How to call a method of the module; see `find_calling`."""
        return find_calling(
            method,
            self.train,
            self.chained,
            fields,
            self.call,
            self.inputs,
            self.side,
        )

    @property
    def particular(self) -> bool:
        """Whether the user says how this one module is called, or where it is."""
        said = (self.inputs, self.side, self.output)
        return bool(self.places) or any(value is not None for value in said)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What comes into a module in one call.

    Attributes:
        x: what the layer before returned.
        side: the side inputs; `None` if the call was given none.
        train: whether the call trains.
        carry: the skips that the layer pops or peeks.
    """

    x: PyTree
    side: PyTree = None
    train: bool = False
    carry: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModuleFunction(abc.ABC):
    """The function of a layer that runs a Flax module.

    It is a frozen value, so that equal layers are equal, also after pickling, and share
    their compiled programs. Two closures over equal modules would never be equal.

    Attributes:
        name: the layer's.
        calling: how the module is called.
        borrow: parts of the parameters that other layers own.
        output: the part of the module's result that is the layer's output.
        particular: whether the user said how this one module is called, or where it is:
            then a tuple is no output by itself.
        places: where its variables are in those of the whole model; `()`: at the
            layer's number. It changes nothing in what is computed.
        shapes: the module's variables by collection, where a sample showed them.
    """

    name: str
    calling: Calling
    borrow: tuple[Borrow, ...]
    output: Output = dataclasses.field(default=None, kw_only=True)
    particular: bool = dataclasses.field(default=False, kw_only=True)
    places: tuple[Place, ...] = dataclasses.field(
        default=(), kw_only=True, compare=False
    )
    shapes: Mapping[str, PyTree] | None = dataclasses.field(
        default=None, kw_only=True, compare=False
    )

    @property
    @abc.abstractmethod
    def stateful(self) -> bool:
        """Whether the module has variables that are no parameters."""

    @property
    @abc.abstractmethod
    def draws(self) -> bool:
        """Whether the module may draw random numbers."""

    @property
    def switched(self) -> bool:
        """Whether the module does something else in training."""
        return bool(self.calling.switches)

    @abc.abstractmethod
    def run(
        self,
        params: PyTree,
        inputs: Inputs,
        state: PyTree,
        key: Any,
        borrowed: Mapping[str, PyTree],
    ) -> tuple[PyTree, PyTree]:
        """`(y, state)` of one microbatch, `y` as the module returns it.

        Arguments:
            params: all of the module's, the borrowed ones in their places.
            borrowed: what the owners have, for errors.
        """

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the module's call."""
        return self.calling.arguments(
            inputs.x, inputs.side, inputs.train, inputs.carry, self.name
        )

    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        *,
        state: PyTree = None,
        key: Any = None,
        train: bool = False,
        borrowed: Mapping[str, PyTree] | None = None,
        side: PyTree = None,
        carry: Mapping[str, PyTree] | None = None,
    ) -> Any:
        """The layer on one microbatch, as the pipe calls it."""
        # Not every module asks for every need: what it does not ask for is not passed.
        owners = borrowed or {}
        # The module must find all of its parameters in one tree, whoever owns them.
        params = lend(self.borrow, params, owners)
        inputs = Inputs(x, side, train, carry or {})
        try:
            y, new_state = self.run(params, inputs, state or {}, key, owners)
        except Exception as error:
            if isinstance(x, tuple) and self.calling.takes_whole:
                error.add_note(
                    f"layer {self.name!r} takes one input and got the tuple "
                    f"{describe(x)}: where the module before returns more than its "
                    "output, write `fpipe.flax.layer(module, output=0)` there"
                )
            raise
        y, *returned = self.picked(y)
        if self.stateful:
            returned.append(new_state)
        return (y, *returned) if returned else y

    def picked(self, y: Any) -> tuple[PyTree, ...]:
        """The layer's output, out of what the module returned; after it the carry, if
        the module takes one.

        Raises:
            TypeError: a module that takes a carry and returns none.
            ValueError: the module returns a tuple, and nobody said which entry is the
                output, or the tuple lacks that entry.
        """
        if not self.calling.carry:
            return (self._output_of(y),)
        if type(y) is not tuple or len(y) != 2:
            raise TypeError(
                f"layer {self.name!r}: its module takes `carry`, so it returns `(y, "
                f"carry)`, got {describe(y)}"
            )
        y, carry = y
        return self._output_of(y), carry

    def _output_of(self, y: Any) -> PyTree:
        """The layer's output, out of what the module returned without the carry."""
        if callable(self.output):
            return self.output(y)
        if self.output is not None:
            try:
                return y[self.output]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"layer {self.name!r}: output={self.output!r} is no entry of what "
                    f"its module returned, {describe(y)}"
                ) from error
        if self.particular and isinstance(y, tuple):
            raise ValueError(
                f"layer {self.name!r}: its module returned the tuple {describe(y)}; "
                "say which of it is the layer's output, "
                "`fpipe.flax.layer(module, output=0)`, or `output=lambda y: y` for all"
            )
        return y

    def as_layer(
        self,
        init: Callable[..., PyTree] | None,
        init_state: Callable[..., PyTree] | None,
        finish: Callable[[PyTree], PyTree] | None = None,
        defer: Callable[[], Layer] | None = None,
        state_rows: bool | None = None,
        overwrite: Sequence[str] = (),
    ) -> Layer:
        """The layer of this function; it declares what the module uses.

        Raises:
            TypeError: `state_rows` of a module without state.
        """
        if state_rows is not None and not self.stateful:
            raise TypeError(
                f"`fpipe.flax.layer(state_rows={state_rows!r})`: layer {self.name!r} "
                "has no state that could have rows; a linen module shows its "
                "collections on a sample input, `fpipe.flax.layer(module, x, ...)`"
            )
        # Not by the signature of `__call__`, which is the same for all modules, but
        # what this module uses: a state forbids schedules that permute forwards, and a
        # key would make programs depend on the numbers of microbatches and layers.
        declared = {
            "state": self.stateful,
            "key": self.draws,
            "train": self.switched and self.calling.train is None,
            "borrowed": bool(self.borrow),
            "side": bool(self.calling.side),
            "carry": self.calling.carry,
        }
        return Layer(
            self,
            init,
            self.name,
            needs=[need for need, used in declared.items() if used],
            borrow=tuple(dict.fromkeys(part.layer for part in self.borrow)),
            init_state=init_state if self.stateful else None,
            finish=finish,
            defer=defer,
            state_rows=state_rows,
            overwrite=overwrite,
        )
