"""Neighbours on a device as one program: fewer launches, and fewer arrays.

In: the work of a call, in the order in which it is issued. Out: the same, with some
neighbours in one. Under 1F1B on two devices the last stage runs

    before    F(1,0)  B(1,0)  F(1,1)  B(1,1)      four launches
    after     F(1,0) B(1,0)   F(1,1) B(1,1)       two

A launch is the host's work for a program. It takes as long for a small program as for a
large one, and the host may be what a step waits for. What a fused forward leaves for
its backward is no array either: XLA keeps it, or makes it again, as it does in an
unpipelined step.

A fused program returns everything when all of it has run, and starts when all that it
reads is there. So actions are fused only where nobody waits longer for that:

1. They are of one microbatch, and nothing else runs between them on their device. So a
   program does not grow with the number of microbatches.
2. What the earlier ones make is read on their own device alone. Another one would wait
   for the later ones. That is why `I` and `W` are seldom fused: the stage before waits
   for what `I` makes. It would not wait where it is still busy, but how long it is busy
   is not known here. In a simulation of `zb_v` with the costs of its paper, nobody
   waits; under other costs a step took up to 7 % longer.
3. What the later ones read is on their device before the first one starts. An `R`
   runs while its `B` waits for a cotangent, so these two stay apart.
4. At least half of the microbatches run so. A fused program is one more to compile.
"""

from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple, TypeAlias

from fpipe._executors.placed.instructions import Number, Slot, Value
from fpipe._executors.placed.shardings import Shardings
from fpipe._executors.placed.work import CopyWork, Work
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Programs
from fpipe._program.chain import Chain
from fpipe.schedules._rules import StageKind

# What runs on a device after what.
Link: TypeAlias = tuple[StageKind, StageKind]


def fuse(
    work: Sequence[Work | CopyWork],
    left: Set[Value],
    programs: Programs,
    shardings: Shardings,
) -> list[Work | CopyWork]:
    """Fuse neighbours in the work of a call, or of a half of it.

    Arguments:
        left: what is read when all of this work is done.
        programs: those of the call, which keep the fused ones.
        shardings: how arrays lie over meshes.
    """
    neighbours = _Neighbours(work)
    # Each group of neighbours stands at the place of its first. What is around the
    # schedule and comes between them, such as zeros for a sum, stands before it.
    groups: dict[int, _Group] = {}
    latest: dict[Placement, _Group] = {}
    between: dict[Placement, list[int]] = {}
    for number, item in enumerate(work):
        if number in neighbours.fit:
            latest[item.placement].before.extend(between.pop(item.placement, ()))
            latest[item.placement].members.append(number)
        elif item.action is None:
            between.setdefault(item.placement, []).append(number)
        else:
            between.pop(item.placement, None)
            latest[item.placement] = groups[number] = _Group([], [number])
    placed = {n for group in groups.values() for n in (*group.before, *group.members)}
    made: list[Work | CopyWork] = []
    for number, item in enumerate(work):
        group = groups.get(number)
        if group is None:
            made += [] if number in placed else [item]
            continue
        made += [work[n] for n in group.before]
        members = [work[n] for n in group.members]
        fused = [member for member in members if isinstance(member, Work)]
        if len(fused) < 2:
            made.append(item)
            continue
        own = set(group.members)
        outside = {
            value
            for member in fused
            for value in _values(member.outs)
            if value in left or not neighbours.readers.get(value, set()) <= own
        }
        made.append(_fused(fused, outside, programs, shardings))
    return made


class _Group(NamedTuple):
    """What is issued together, as numbers of the work.

    Attributes:
        before: what is issued right before.
        members: what becomes one program; one alone stays what it is.
    """

    before: list[int]
    members: list[int]


class _Neighbours:
    """Which work can be fused with that before it on its device.

    Attributes:
        readers: of each value the numbers of what reads it.
        fit: the numbers of the work that is fused with that before it.
    """

    def __init__(self, work: Sequence[Work | CopyWork]) -> None:
        self._work = work
        self._maker: dict[Value, int] = {}
        self.readers: dict[Value, set[int]] = {}
        for number, item in enumerate(work):
            for value in _values(item.reads):
                self.readers.setdefault(value, set()).add(number)
            self._maker |= dict.fromkeys(_values(item.outs), number)
        links: dict[int, Link] = {}
        last: dict[Placement, int] = {}
        # What of other devices is on a device by now.
        here: dict[Placement, set[Value]] = {}
        for number, item in enumerate(work):
            own = here.setdefault(item.placement, set())
            if isinstance(item, CopyWork) or self._follows(item):
                last.pop(item.placement, None)
            elif item.action is not None:
                before = last.get(item.placement)
                if before is not None and self._fits(before, number, own):
                    links[number] = self._link(before, number)
                last[item.placement] = number
            own.update(_values(item.reads))
        counts = Counter(links.values())
        microbatches = len(
            {item.action.microbatch for item in work if item.action is not None}
        )
        self.fit = {
            number for number, link in links.items() if 2 * counts[link] >= microbatches
        }

    def _follows(self, item: Work) -> bool:
        """Whether it is around the schedule and reads what the schedule makes."""
        return item.action is None and any(
            self._work[self._maker[value]].action is not None
            for value in _values(item.ins)
            if value in self._maker
        )

    def _link(self, before: int, number: int) -> Link:
        ends = []
        for n in (before, number):
            action = self._work[n].action
            assert action is not None
            ends.append(StageKind(action.kind, action.stage))
        return ends[0], ends[1]

    def _fits(self, before: int, number: int, here: Set[Value]) -> bool:
        """Whether some work can be fused with that before it on its device."""
        first, item = self._work[before], self._work[number]
        assert isinstance(first, Work)
        assert isinstance(item, Work)
        assert first.action is not None
        assert item.action is not None
        if first.action.microbatch != item.action.microbatch:
            return False
        # A value in the memory of the host would come and go within a program.
        codes = (first.code, item.code)
        if any(code is None or code.on_host for code in codes):
            return False
        for value in _values(first.outs):
            for reader in self.readers.get(value, ()):
                other = self._work[reader]
                # What is around the schedule comes when everything has run.
                if other.action is None:
                    continue
                if isinstance(other, CopyWork) or other.placement != item.placement:
                    return False
        for value in _values(item.reads):
            maker = self._maker.get(value)
            if maker is None or value in here:
                continue
            if self._work[maker].placement != item.placement:
                return False
        return True


def _fused(
    members: Sequence[Work],
    outside: Set[Value],
    programs: Programs,
    shardings: Shardings,
) -> Work:
    """Some work as one program.

    Arguments:
        outside: what of its results is read elsewhere.
    """
    placement = members[0].placement
    made = {slot for member in members for slot in member.outs}
    ins: list[Slot] = []
    # Numbers of microbatches and of layers are not shared: those of some microbatch and
    # of some layer are equal by chance, and would make another chain.
    known: dict[Slot, int] = {}
    takes: list[list[int | Slot]] = []
    for member in members:
        own: list[int | Slot] = []
        for slot in member.ins:
            # One member may know it where it was made, another one here.
            here = slot.on(placement)
            if here in made:
                own.append(here)
                continue
            if here not in known or isinstance(slot.value, Number):
                known[here] = len(ins)
                ins.append(slot)
            own.append(known[here])
        takes.append(own)
    every = [slot for member in members for slot in member.outs]
    number_of = {slot: len(ins) + n for n, slot in enumerate(every)}
    outs = [slot for slot in every if slot.value in outside]
    donates = [
        slot for member in members for slot in member.donates if slot not in made
    ]
    actions = [member.action for member in members if member.action is not None]
    chain = Chain(
        calls=tuple(member.call for member in members if member.call is not None),
        takes=tuple(
            tuple(number_of[n] if isinstance(n, Slot) else n for n in own)
            for own in takes
        ),
        counts=tuple(len(member.outs) for member in members),
        returns=tuple(number_of[slot] for slot in outs),
        donates=tuple(known[slot] for slot in donates),
        name="_".join(action.kind for action in actions),
        results=()
        if placement.mesh is None
        else tuple(
            None if slot in shardings.free else shardings.known[slot] for slot in outs
        ),
    )
    brings = dict.fromkeys(slot for member in members for slot in member.brings)
    return Work(
        name="+".join(member.name for member in members),
        call=programs.chained([action.stage for action in actions], chain),
        ins=tuple(ins),
        outs=tuple(outs),
        placement=placement,
        brings=tuple(slot for slot in brings if slot not in made),
        calls_host=any(member.calls_host for member in members),
        donates=tuple(donates),
        parts=tuple(members),
    )


def _values(slots: Sequence[Slot]) -> list[Value]:
    """What is in some slots, wherever they are."""
    return [slot.value for slot in slots]
