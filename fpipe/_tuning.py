"""`Tuning`: what `tune` finds, as data and as text.

In: candidates in the order of their predictions, and what some of them took when they
ran. Out: a `Tuning`. The prediction had 1f1b first; measured, zb_h1 is:

    schedule  chunks  checkpoint  balance      step  measured  ratio
    zb_h1          8  never       [2, 2]     1.9 ms    2.1 ms   1.11
    1f1b           8  never       [2, 2]     1.8 ms    4.1 ms   2.28
    gpipe          8  never       [2, 2]     2.0 ms
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fpipe._measured_steps import Failed, StepTime
from fpipe._pipe import Pipe
from fpipe._planning.prediction import Prediction
from fpipe._planning.text import Table, quantity, size
from fpipe.schedules._html import escape

# A measured step that is longer or shorter than predicted by more than this share gets
# a sentence. Less than that may be other work on the machine.
_FAR = 0.25

# Of how many candidates a message has the reasons. The table has those of all.
_SHOWN = 20

# The share of a step during which the host launches, from which it may be the bound.
_LAUNCHING = 0.8


class Candidate(NamedTuple):
    """One combination of options of a pipe, with its prediction.

    Attributes:
        schedule, checkpoint: as for `Pipe`. A function is given by its name.
        chunks: the number of microbatches asked for.
        pipe: the `Pipe`, ready to use. `None` if the combination is not possible.
        prediction: the `Prediction` of a training step. `None` if there is none.
        refused: why the combination cannot be used; empty if it can.
        recompute: as for `Pipe`. `"auto"` if nothing is recomputed.
        offload: as for `Pipe`.
        measured: the seconds of a step, measured. `None` if it was not.
        launched: the seconds of this step until the host had launched all of it.
        ratio: the measured step, divided by the predicted one. If predictions are in
            FLOPs, this quotient divided by that of the best candidate, whose ratio is
            then 1.
    """

    schedule: Any
    checkpoint: Any
    chunks: int
    pipe: Pipe | None = None
    prediction: Prediction | None = None
    refused: str = ""
    recompute: str = "auto"
    offload: Any = None
    measured: float | None = None
    launched: float | None = None
    ratio: float | None = None

    @property
    def options(self) -> str:
        """What it is, in a sentence."""
        text = f"{self.schedule}, chunks={self.chunks}, checkpoint={self.checkpoint!r}"
        if when := _when_recomputed(self):
            text += f", recompute={when!r}"
        if self.offload is not None:
            text += f", offload={self.offload!r}"
        return text


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All candidates, the best first. It prints as a table.

    Attributes:
        candidates: first the candidates that were measured, sorted by the measured time
            of a step. Then the others that fit into memory, sorted by the predicted
            time. Then those that failed when they ran, those that are too large, sorted
            by the bytes that they lack, and the combinations that are not possible.
        unit: the unit of predicted times, `"FLOP"` or `"second"`.
    """

    candidates: tuple[Candidate, ...]
    unit: str

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        unit: str,
        times: Sequence[StepTime | Failed],
    ) -> "Tuning":
        """All candidates with what was measured.

        Arguments:
            candidates: by prediction, the best first.
            times: of the first ones, which ran.
        """
        found = list(candidates)
        for n, time in enumerate(times):
            if isinstance(time, Failed):
                failed = f"failed when it ran: {time.error}"
                found[n] = found[n]._replace(refused=failed)
            else:
                found[n] = found[n]._replace(
                    measured=time.seconds, launched=time.launch
                )
        # Sorting keeps the order of those that are alike.
        found.sort(key=_rank_measured)
        quotients = [_quotient(c) for c in found]
        # Seconds for a FLOP say nothing by themselves. What can be compared is how they
        # differ between candidates.
        whole = quotients[0] if unit == "FLOP" and quotients else 1.0
        return cls(
            tuple(
                c if q is None or not whole else c._replace(ratio=q / whole)
                for c, q in zip(found, quotients, strict=True)
            ),
            unit,
        )

    @property
    def best(self) -> Candidate:
        """The fastest candidate that fits into memory: as measured, or else as
        predicted.

        Raises:
            ValueError: no candidate fits; the message has the reasons.
        """
        first = self.candidates[0]
        if first.pipe is None or first.refused:
            reasons = [f"{c.options}: {c.refused}" for c in self.candidates]
            more = len(reasons) - _SHOWN
            if more > 0:
                reasons[_SHOWN:] = [f"{more} more, which `print(tuning)` shows"]
            raise ValueError(
                "`fpipe.tune(...)`: no candidate fits; why not, the nearest first:"
                f"{as_list(reasons)}"
            )
        return first

    @property
    def pipe(self) -> Pipe:
        """The pipe of the fastest candidate that fits into memory.

        Raises:
            ValueError: no candidate fits.
        """
        found = self.best.pipe
        assert found is not None
        return found

    @property
    def why(self) -> str:
        """The reasons for the best candidate, as text.

        It says how much slower the next best schedule, number of microbatches and
        checkpoint mode are, and where a measured step differs from its prediction.

        Raises:
            ValueError: no candidate fits.
        """
        best = self.best
        own = best.prediction
        assert own is not None
        # First what it takes, then what each other choice would cost, one at a time.
        step = f"step {quantity(own.step, self.unit)}"
        if best.measured is not None:
            step += f", measured {quantity(best.measured, 'second')}"
        lines = [
            f"{best.options}: {step}, bubble {own.bubble:.0%}, peak {size(own.peak)}"
        ]
        for field, noun in _CHOICES:
            lines += self._next_best(field, noun)
        lines += self._measured_lines()
        short = sum(map(_is_too_large, self.candidates))
        if short:
            lines.append(f"{short} candidates do not fit")
        unknown = sum(c.prediction is None for c in self.candidates)
        if unknown:
            lines.append(
                f"{unknown} candidates have no prediction, the table has the reasons"
            )
        return "\n- ".join(lines)

    def _next_best(self, field: str, noun: str) -> list[str]:
        """How the best candidate compares with the next best one that differs from it
        in one choice.
        """
        # Candidates are in order, so the first one that is equal in all other choices
        # is the next best. A candidate that differs in two choices would not tell the
        # effect of either.
        best = self.best
        # But when something is recomputed belongs to whether it is.
        with_it = {field, "recompute"} if field == "checkpoint" else {field}
        others = [name for name, _ in _CHOICES if name not in with_it]
        for c in self.candidates[1:]:
            alike = all(getattr(c, name) == getattr(best, name) for name in others)
            if c.refused or c.prediction is None or not alike:
                continue
            longer = _longer(c, best)
            unmeasured = best.measured is not None and c.measured is None
            by = ", by prediction" if unmeasured else ""
            # A difference that would be printed as 0.0 % is none.
            if longer > 0.0005:
                return [
                    f"the next best {noun} ({getattr(c, field)}) takes "
                    f"{longer:.1%} longer{by}"
                ]
            return [
                f"the {noun} {getattr(c, field)} takes as long{by}, and needs "
                f"{size(c.prediction.peak)}"
            ]
        return []

    def _measured_lines(self) -> list[str]:
        """Where predictions and measurements differ, and what failed."""
        measured = [c for c in self.candidates if c.measured is not None]
        lines = []
        if measured and self.unit == "FLOP":
            lines.append(
                "predictions are in FLOPs: only their order and their ratios are "
                "compared with measured seconds"
            )
        first = min(measured, key=predicted_order, default=None)
        if first is not None and first is not measured[0]:
            lines.append(
                f"predicted as the best was {first.options}; measured, it takes "
                f"{_longer(first, measured[0]):.1%} longer"
            )
        far = [c for c in measured if c.ratio is not None and _is_far(c.ratio)]
        against = "" if self.unit == "second" else ", compared with the best"
        lines += [
            f"{c.options}: measured {c.ratio:.2f} times the prediction{against}"
            for c in far
        ]
        # Several candidates may have one cause.
        hints = [hint for c in far if (c.ratio or 0.0) > 1 for hint in _hints(c)]
        lines += dict.fromkeys(hints)
        lines += [
            f"{c.options}: {c.refused}" for c in self.candidates if _has_failed(c)
        ]
        return lines

    def __str__(self) -> str:
        # `why` raises if no candidate fits. The table gives each one's reason.
        lines = str(self._table())
        return lines if self.candidates[0].refused else f"{lines}\n\n{self.why}"

    def _repr_html_(self) -> str:
        lines = self._table().html()
        if self.candidates[0].refused:
            return lines
        first, *reasons = self.why.split("\n- ")
        items = [f"<li>{escape(text)}</li>" for text in reasons]
        return "\n".join([lines, f"<p>{escape(first)}</p>", "<ul>", *items, "</ul>"])

    def _table(self) -> Table:
        """A row for each candidate."""
        head = ["schedule", "chunks", "checkpoint"]
        # `Table` leaves out a column in which all cells are empty.
        head += ["recompute", "offload", "balance", "step", "measured", "ratio"]
        head += ["bubble", "peak", ""]
        rows = []
        for c in self.candidates:
            balance = "" if c.pipe is None else str(list(c.pipe.balance))
            row = [str(c.schedule), str(c.chunks), str(c.checkpoint)]
            row.append(_when_recomputed(c))
            row += ["" if c.offload is None else str(c.offload), balance]
            own = c.prediction
            row.append("" if own is None else quantity(own.step, self.unit))
            row.append("" if c.measured is None else quantity(c.measured, "second"))
            row.append("" if c.ratio is None else f"{c.ratio:.2f}")
            row += ["", ""] if own is None else [f"{own.bubble:.1%}", size(own.peak)]
            rows.append([*row, c.refused])
        return Table(head, rows, left=(0, 2, 3, 5, 11))


def as_list(lines: Sequence[str]) -> str:
    """What a message lists, each line below the one before."""
    return "".join(f"\n- {line}" for line in lines)


def _rank_measured(c: Candidate) -> tuple[int, float]:
    """The order of candidates that are in the order of their predictions."""
    if c.measured is not None:
        return 0, c.measured
    return (2 if c.refused else 1), 0.0


def _quotient(c: Candidate) -> float | None:
    """Measured seconds for what was predicted, if both are known."""
    if c.measured is None or c.prediction is None or not c.prediction.step:
        return None
    return c.measured / c.prediction.step


def _longer(c: Candidate, best: Candidate) -> float:
    """By what share a step is longer than the best one: as measured, if both were."""
    if c.measured is not None and best.measured is not None:
        step, shortest = c.measured, best.measured
    else:
        assert c.prediction is not None
        assert best.prediction is not None
        step, shortest = c.prediction.step, best.prediction.step
    return step / shortest - 1 if shortest else 0.0


def predicted_order(c: Candidate) -> tuple[float, int]:
    """The order of candidates that fit: by the predicted time, then by memory."""
    assert c.prediction is not None
    # Sums of floats differ in their last digits. Steps that differ only there count as
    # equal, and memory decides between them.
    return float(f"{c.prediction.step:.9e}"), c.prediction.peak


def _is_far(ratio: float) -> bool:
    return not 1 / (1 + _FAR) <= ratio <= 1 + _FAR


def _hints(c: Candidate) -> Iterator[str]:
    """What may make a step longer than predicted."""
    assert c.pipe is not None
    assert c.prediction is not None
    launched, measured = c.launched or 0.0, c.measured or 0.0
    if c.pipe.executor == "placed" and launched > _LAUNCHING * measured:
        yield (
            f"the host launches for {quantity(launched, 'second')} of "
            f"{quantity(measured, 'second')} and may be the bound: take fewer "
            'microbatches, executor="scan", or predict with by="time", which measures '
            "launches"
        )
    devices = {d for place in c.pipe._cut.placements for d in place.devices}
    if len(c.prediction.devices) < c.prediction.schedule.devices:
        yield "a device is named several times, and does the work of all of them"
    elif len(devices) > 1 and {d.platform for d in devices} == {"cpu"}:
        yield "these devices are of one CPU, and share its cores"


def _is_too_large(c: Candidate) -> bool:
    """Whether all that a candidate with a prediction lacks is memory."""
    rows = () if c.prediction is None else c.prediction.devices
    return any(row.missing for row in rows)


def _has_failed(c: Candidate) -> bool:
    """Whether a candidate fits, and failed when it ran."""
    return bool(c.refused) and c.prediction is not None and not _is_too_large(c)


def _when_recomputed(c: Candidate) -> str:
    """When a candidate recomputes, if it does, and if it was chosen."""
    return "" if c.checkpoint == "never" or c.recompute == "auto" else c.recompute


# The fields that tell candidates apart, and what they are called in sentences.
_CHOICES = (
    ("schedule", "schedule"),
    ("chunks", "number of microbatches"),
    ("checkpoint", "checkpoint mode"),
    ("recompute", "time of recomputations"),
)
