"""A function of arrays on several devices, compiled and dispatched as the programs that
it was cut into.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from fpipe._core.pytrees import strong
from fpipe._executors.placement import Device
from fpipe.optim._cut import Cut, Move, Part, Slot
from fpipe.optim._steps import evaluate


class Run:
    """A cut function, ready to call: each program is compiled once, on its first call.

    Attributes:
        cut: the programs and what moves between devices, as data.
        calls: one jitted function for each program.
        donated: the slots that each program is given for good.
    """

    def __init__(
        self, cut: Cut, devices: Sequence[Device], donate: Sequence[bool]
    ) -> None:
        self.cut, self.devices = cut, tuple(devices)
        self.donated = _donated(cut, donate)
        self.calls = [
            self._compiled(p, gone)
            for p, gone in zip(cut.parts, self.donated, strict=True)
        ]
        graph = cut.steps
        self._consts = {
            v: np.asarray(c) if isinstance(c, jax.Array) and _plain(c) else c
            for v, c in graph.consts.items()
        }
        self._given_away = sorted({slot for gone in self.donated for slot in gone})
        # The moves before each program, in as few calls as there are devices; and those
        # of outputs that nothing reads.
        self._moves: list[dict[int, list[int]]] = [
            {} for _ in range(len(cut.parts) + 1)
        ]
        for move in cut.moves:
            self._moves[_position(cut, move)].setdefault(move.target, []).append(
                move.slot
            )

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Run it on the inputs; nothing waits."""
        arrays = list(arrays)
        if self._given_away:
            seen: dict[int, int] = {}
            for array in arrays:
                seen[id(array)] = seen.get(id(array), 0) + 1
            for slot in self._given_away:
                if (
                    seen[id(arrays[slot])] > 1
                    # a buffer can be given away once, and not while it is read
                    # elsewhere
                ):
                    arrays[slot] = jnp.copy(arrays[slot])
        at: dict[
            tuple[int, int | None], Any
        ] = {}  # arrays by slot and device; `None`: where it is made
        for n, (part, call) in enumerate(zip(self.cut.parts, self.calls, strict=True)):
            self._move(self._moves[n], arrays, at)
            made = call(
                *(self._find(slot, part.device, arrays, at) for slot in part.takes)
            )
            at.update(zip([(slot, None) for slot in part.gives], made, strict=True))
        self._move(self._moves[-1], arrays, at)
        return [
            self._find(slot, device, arrays, at) for slot, device in self.cut.outputs
        ]

    def _find(
        self,
        slot: int,
        device: int | None,
        arrays: Sequence[Any],
        at: dict[tuple[int, int | None], Any],
    ) -> Any:
        moved = at.get((slot, device))
        if moved is not None:
            return moved
        return arrays[slot] if slot < len(arrays) else at[slot, None]

    def _move(
        self,
        moves: dict[int, list[int]],
        arrays: Sequence[Any],
        at: dict[tuple[int, int | None], Any],
    ) -> None:
        for device, slots in moves.items():
            put = jax.device_put(
                [self._find(s, None, arrays, at) for s in slots], self.devices[device]
            )
            at.update(zip([(s, device) for s in slots], put, strict=True))

    def _compiled(self, part: Part, gone: Sequence[int]) -> Callable[..., list[Any]]:
        cut = self.cut
        takes, gives = (
            [cut.slots[s] for s in part.takes],
            [cut.slots[s] for s in part.gives],
        )
        wanted = [v for slot in gives for v in slot.values]

        def run(*arrays: Any) -> list[Any]:
            given: dict[int, Any] = {}
            for slot, array in zip(takes, arrays, strict=True):
                given.update(_split(cut, slot, array))
            made = iter(self._evaluate(part, given, wanted))
            joined = [
                _joined(slot, [next(made) for _ in slot.values]) for slot in gives
            ]
            # A weak type would make the next step a new one to compile.
            return [
                a if slot.output is None else strong(a)
                for slot, a in zip(gives, joined, strict=True)
            ]

        run.__name__ = run.__qualname__ = f"fpipe_optim_{part.round}"
        place = SingleDeviceSharding(self.devices[part.device])
        numbers = tuple(part.takes.index(slot) for slot in gone)
        # Without arguments nothing else says where it runs.
        return (
            jax.jit(run, donate_argnums=numbers)
            if takes
            else jax.jit(run, out_shardings=place)
        )

    def _evaluate(
        self, part: Part, given: dict[int, Any], wanted: Sequence[int]
    ) -> list[Any]:
        graph = self.cut.steps
        made = evaluate(graph, part.steps, {**self._consts, **given}, wanted)
        return [
            a if isinstance(a, jax.Array) else jnp.asarray(a, graph.avals[v].dtype)
            for v, a in zip(wanted, made, strict=True)
        ]


def _position(cut: Cut, move: Move) -> int:
    """The program before which an array moves."""
    first = (
        n
        for n, p in enumerate(cut.parts)
        if p.device == move.target and move.slot in p.takes
    )
    return next(first, len(cut.parts))


def _plain(array: Any) -> bool:
    return isinstance(array.dtype, np.dtype)


def _split(cut: Cut, slot: Slot, array: Any) -> dict[int, Any]:
    if not slot.bundle:
        return {slot.values[0]: array}
    out, start = {}, 0
    for v in slot.values:
        shape = cut.steps.avals[v].shape
        end = start + int(np.prod(shape, dtype=np.int64))
        out[v] = array[start:end].reshape(shape)
        start = end
    return out


def _joined(slot: Slot, values: Sequence[Any]) -> Any:
    return (
        jnp.concatenate([v.reshape(-1) for v in values]) if slot.bundle else values[0]
    )


def _donated(cut: Cut, donate: Sequence[bool]) -> list[list[int]]:
    """The inputs that each program may have for good: it is the last to read them, and
    has an output of that form.
    """
    graph = cut.steps
    last: dict[int, int] = {}
    for n, part in enumerate(cut.parts):
        last.update(dict.fromkeys(part.takes, n))
    copies = {(m.slot, m.target) for m in cut.moves}
    kept = {slot for slot, _ in cut.outputs}
    for move in cut.moves:
        last[move.slot] = max(last.get(move.slot, 0), _position(cut, move))
    out = []
    for n, part in enumerate(cut.parts):
        forms = [
            _form(graph.avals[cut.slots[s].values[0]])
            for s in part.gives
            if not cut.slots[s].bundle
        ]
        gone = []
        for slot in part.takes:
            mine = (
                slot < len(donate)
                and donate[slot]
                and (slot, part.device) not in copies
            )
            if not mine or last[slot] != n or slot in kept:
                continue
            form = _form(graph.avals[cut.slots[slot].values[0]])
            if form in forms:
                forms.remove(form)
                gone.append(slot)
        out.append(gone)
    return out


def _form(aval: Any) -> tuple[Any, ...]:
    return aval.shape, aval.dtype
