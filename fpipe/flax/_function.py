"""What linen and NNX modules share as layers: the options that a user gives, and the
function behind the layer.

    fpipe.flax.layer(nn.BatchNorm(), train="not frozen")
        -> ModuleOptions(name="BatchNorm", train="not frozen")
        -> LinenFunction(name="BatchNorm", …)                   a ModuleFunction
        -> fpipe.Layer(apply=LinenFunction(…), needs=("state", "key", "train"), …)
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer
from fpipe.flax._borrow import Borrow, lend
from fpipe.flax._calling import Calling


@dataclasses.dataclass(frozen=True)
class ModuleOptions:
    """What a user says of one module; see `fpipe.flax.layer`.

    Attributes:
        chained: whether the module stands in a Flax `Sequential`.
    """

    name: str
    x: PyTree = None
    rngs: Iterable[str] | None = None
    state: Iterable[str] | None = None
    train: str | bool | None = None
    method: str | Callable[..., Any] | None = None
    borrow: tuple[Borrow, ...] = ()
    chained: bool = False
    state_rows: bool | None = None

    @property
    def call(self) -> str:
        """Where the options come from, for errors."""
        return f"`fpipe.flax.layer(module)` of layer {self.name!r}"


@dataclasses.dataclass(frozen=True)
class ModuleFunction(abc.ABC):
    """The function of a layer that runs a Flax module.

    It is a frozen value, so that equal layers are equal, also after pickling, and share
    their compiled programs. Two closures over equal modules would never be equal.

    Attributes:
        name: the layer's.
        calling: how the module is called.
        borrow: parts of the parameters that other layers own.
    """

    name: str
    calling: Calling
    borrow: tuple[Borrow, ...]

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
        x: PyTree,
        state: PyTree,
        key: Any,
        train: bool,
        borrowed: Mapping[str, PyTree],
    ) -> tuple[PyTree, PyTree]:
        """`(y, state)` of one microbatch.

        Arguments:
            params: all of the module's, the borrowed ones in their places.
            borrowed: what the owners have, for errors.
        """

    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        *,
        state: PyTree = None,
        key: Any = None,
        train: bool = False,
        borrowed: Mapping[str, PyTree] | None = None,
    ) -> Any:
        """The layer on one microbatch, as the pipe calls it."""
        # Not every module asks for every need: what it does not ask for is not passed.
        owners = borrowed or {}
        # The module must find all of its parameters in one tree, whoever owns them.
        params = lend(self.borrow, params, owners)
        y, new_state = self.run(params, x, state or {}, key, train, owners)
        return (y, new_state) if self.stateful else y

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
