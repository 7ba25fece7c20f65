"""Who makes and who reads everything that goes through a pipeline.

In: the stages of a model, in order; the placed executor's stages, or the scan
executor's units. Out: `Routes`. Both lowerings ask it where a value comes from, and
neither decides that itself. For three stages, where the first stashes the skip "a", and
the last pops it and borrows the parameters of layer 0:

    what                     made by    read by                owner of its gradient
    -----------------------  ---------  ---------------------  ---------------------
    Port("x")                the call   stage 0                stage 0
    Port("y") of stage 0     stage 0    stage 1, as Port("x")  stage 0
    Port("skip", a)          stage 0    stage 2                stage 0
    Port("params", 0)        the call   stages 0 and 2         stage 0
    Port("state", 1)         stage 1    stage 1, by the next   none
                                        microbatch
    Port("side")             the call   whoever asks           its first reader
    Port("key")              the call   whoever asks           none
    Port("targets")          the call   stage 2                stage 2

Cotangents go the same ways back: a reader makes one for the maker, if the leaf has a
gradient there (`Programs.readers`). A borrower's program takes only the leaves that it
reads, so borrowing goes leaf by leaf although it is declared by layer. A key goes whole
to every stage that asks for it, with the microbatch's number and the numbers of the
layers beside it: the program makes each layer's key of these three. So no key depends
on where the stages are cut.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

from fpipe._model.stages import CALL_PORTS, TARGETS, Port, Stage, X, Y


class End(NamedTuple):
    """One end of a route: a stage, and what it calls the value."""

    stage: int
    port: Port


@dataclasses.dataclass(frozen=True)
class Routes:
    """The routes between some stages of a model.

    They follow from the stages alone, not from a schedule or devices. So two plans of
    one pipe share them, and an executor decides only how a value gets along a route.
    """

    stages: tuple[Stage, ...]

    @functools.cached_property
    def _skip_makers(self) -> Mapping[Port, int]:
        """The stage that stashes each skip that a later one reads."""
        return {
            Port("skip", skip): stage.index
            for stage in self.stages
            for skip in stage.skips_out
        }

    # Looked up for every array of every microbatch while a plan is made, so these are
    # tables, made once.

    @functools.cached_property
    def _stage_of_layer(self) -> Mapping[int, int]:
        return {k: stage.index for stage in self.stages for k in stage.span}

    @functools.cached_property
    def _call_readers(self) -> Mapping[Port, tuple[int, ...]]:
        """The stages that read each input of the call."""
        readers = {
            port: tuple(s.index for s in self.stages if port in s.call_inputs)
            for port in CALL_PORTS
        }
        # The loss reads the targets, and it is no layer that could declare it.
        readers[TARGETS] = (self.stages[-1].index,)
        return readers

    def source(self, stage: int, port: Port) -> End | None:
        """Who makes what a stage reads; `None`: the call gives it.

        A state is the call's for the first microbatch only. Later ones read what the
        one before left, on the same stage; the executors keep that.
        """
        if port == X and stage > 0:
            return End(stage - 1, Y)
        if port.kind == "skip":
            return End(self._skip_makers[port], port)
        return None

    def readers(self, stage: int, port: Port) -> tuple[End, ...]:
        """The other stages that read what a stage makes, and what they call it."""
        # The next stage reads the boundary under another name. A skip keeps its name,
        # and may have several readers: those that peek, and one that pops.
        if port == Y:
            return () if self.stages[stage].last else (End(stage + 1, X),)
        if port.kind == "skip":
            return tuple(
                End(other.index, port)
                for other in self.stages
                if port.of in other.skips_in
            )
        return ()

    def home(self, layer: int) -> int:
        """The stage where a layer's parameters and state live."""
        return self._stage_of_layer[layer]

    def owner(self, port: Port) -> int:
        """The stage where the gradient of what the call gives is summed: that of the
        parameters' own layer, or the first reader.
        """
        if port.kind == "params":
            return self.home(port.of)
        # What no stage reads has a gradient of zeros, made on the first stage.
        readers = self._call_readers[port]
        return readers[0] if readers else 0

    def is_given(self, stage: int, port: Port) -> bool:
        """Whether a stage reads that port of what the call gives and cuts, so that the
        gradient of each piece goes to the piece's place.
        """
        return port in CALL_PORTS and self.source(stage, port) is None
