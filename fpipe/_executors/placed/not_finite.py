"""A call over several processes under `jax.debug_nans` or `jax.debug_infs`.

In one process JAX looks at what each program returned, and raises. Of several processes
only one would raise, and the others would wait for what it does not send. So here a
program that makes a NaN is noted, and the call goes on to its end, NaN and all. Then
the processes tell each other what they have noted:

    process 0    nothing                              raises what process 1 says
    process 1    instruction 7: nan, of log           raises it
    process 2    instruction 9: nan, of tanh          raises what process 1 says

A program that reads a NaN makes others. The first one in the order of the plan is the
cause.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fpipe._core.errors import PREFIX, add_note
from fpipe._core.processes import as_text, as_words, is_shared, meet
from fpipe._core.settings import checked, unchecked
from fpipe._executors.not_finite import forbidden_in
from fpipe._executors.placed.instructions import Run
from fpipe._executors.placed.threads import Call, Step

# What a process tells: the number of the instruction, and words of its message.
_NONE = 2**32 - 1
_WORDS = 1024
_SEPARATOR = "\0"


class Search:
    """Looks for the first program of a call that made what JAX forbids.

    Arguments:
        describe: an instruction in words.
    """

    def __init__(self, describe: Callable[[Run], str]) -> None:
        config: Any = jax.config
        self._nans = bool(config.jax_debug_nans)
        self._infs = bool(config.jax_debug_infs)
        self._describe = describe
        self._number = _NONE
        self._error: FloatingPointError | None = None

    def looked_at(self, step: Step) -> Call:
        """The call of a step, which looks at what it returns. JAX is not to look."""
        item, call = step.item, step.call
        if not isinstance(item, Run):
            return call

        def looked(*arrays: Any) -> Sequence[Any]:
            made = call(*arrays)
            # What this process does later in the plan is no cause.
            if self._error is None:
                found = forbidden_in(made, self._nans, self._infs)
                if found is not None:
                    self._number = step.number
                    self._error = self._explained(item, arrays, found.shown)
                    add_note(self._error, f"while running {self._describe(item)}")
            return made

        return looked

    def _explained(
        self, item: Run, arrays: Sequence[Any], found: str
    ) -> FloatingPointError:
        """The error of a program that made it, which names the operation."""
        # JAX finds the operation when it runs the program again. To run one of several
        # processes again, all of them would have to.
        if not any(is_shared(array.sharding) for array in arrays):
            with jax.debug_nans(self._nans), jax.debug_infs(self._infs), checked():
                try:
                    item.call(*arrays)
                except FloatingPointError as error:
                    return error
        return FloatingPointError(
            f"invalid value ({found}) in the result of a program of several processes. "
            "`Pipe(..., detect_anomaly=True)` names the layer"
        )

    def conclude(self) -> None:
        """What all processes do together at the end of the call.

        Raises:
            FloatingPointError: one of them has found something; in each of them.
        """
        words = np.zeros(1 + _WORDS, np.uint32)
        words[0] = self._number
        if self._error is not None:
            notes = getattr(self._error, "__notes__", ())
            own = [note for note in notes if note.startswith(PREFIX)]
            words[1:] = as_words(_SEPARATOR.join([str(self._error), *own]), _WORDS)
        with unchecked():
            told = meet(words, lambda: "all processes to look for NaNs")
        first = int(np.argmin(told[:, 0]))
        if told[first, 0] == _NONE:
            return
        if first == jax.process_index() and self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # no cycle through the traceback
        message, *notes = as_text(told[first, 1:]).split(_SEPARATOR)
        error = FloatingPointError(message)
        for note in notes:
            error.add_note(f"{note} (process {first})")
        raise error
