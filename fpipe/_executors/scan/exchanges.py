"""Exchanges between devices of one stage that would hang on CPUs.

In: the text of a compiled program, and its mesh. Out: what makes such exchanges, by
stage, kind of action and equation. Of a layer that calls `jax.lax.ppermute` by itself,
over the mesh stage=2 x model=2:

    %a = f32[4,8] collective-permute(%b), source_target_pairs={{0,1},{1,0},{2,3},{3,2}},
        metadata={op_name="jit(loss)/while/body/cond/branch_1_fun/stage0-1 F/ppermute"}

    ["`ppermute` in stage0-1 F"]

Each operation of a stage is a branch of a conditional, and at one tick stages take
different branches. A collective in a branch has to wait for the devices of its own
stage alone. All-reduce, all-gather, reduce-scatter and all-to-all do: they name groups
of devices. A collective-permute names pairs, and XLA for CPUs has it wait for every
device of the program (jax 0.10.2). What goes from stage to stage is a
collective-permute too, but every device runs that one.

Equations that move numbers along an axis run so that XLA exchanges nothing, see
`whole_axes.py`. Where it may exchange something all the same (a layer sends by itself,
or devices share several axes) all devices run an operation together, if any device is
to run it: then every one comes by, see `Step.together`. So little is left that is
refused: exchanges in operations that call Python, or in which numbers decide what runs.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from fpipe._executors.stage_places import AXIS

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_BRANCHES = re.compile(r"(?:branch|true|false)_computations?=\{?([^,}]*(?:, %[^,}]*)*)")
_NAME = re.compile(r"%([\w.\-]+)")
_PERMUTE = re.compile(
    r" collective-permute(?:-start)?\(.*source_target_pairs=\{(\{.*?\})\}"
)
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def find_exchanges(text: str, mesh: Mesh, together: Collection[str] = ()) -> list[str]:
    """What exchanges parts of arrays between the devices of one stage in a branch of a
    conditional.

    Arguments:
        text: of a program that was compiled for the devices of the mesh, in its order.
        together: the operations that all devices run together, by name.
    """
    along = mesh.axis_names.index(AXIS)
    places = np.indices(mesh.devices.shape)[along].reshape(-1)
    found: dict[str, None] = {}
    for line in _lines_in_branches(text):
        permute = _PERMUTE.search(line)
        if permute is None:
            continue
        pairs = [(int(a), int(b)) for a, b in _PAIR.findall(permute[1])]
        if all(places[a] == places[b] for a, b in pairs):
            named = _OP_NAME.search(line)
            path = re.sub(r".*/branch_\d+_fun/", "", named[1] if named else "?")
            action, *within = path.split("/")
            equation = within[-1] if within else "an equation"
            if action not in together:
                found[f"`{equation}` in {action}"] = None
    return list(found)


def refuse_exchanges(text: str, mesh: Mesh, together: Collection[str] = ()) -> None:
    """Refuse a program that would hang; arguments as for `find_exchanges`.

    Raises:
        NotImplementedError: it would.
    """
    found = find_exchanges(text, mesh, together)
    if found:
        shown = ", ".join(found if len(found) <= 4 else [*found[:4], "…"])
        raise NotImplementedError(
            f'`Pipe(executor="scan", mesh=...)`: {shown}: devices of one stage would '
            'exchange parts of an array. With executor="scan" the devices of a CPU '
            "would wait for each other for ever, because the layers also call Python, "
            "or have a `while` or a `cond`. Make the array whole before, by "
            "`jax.lax.with_sharding_constraint(h, jax.sharding.PartitionSpec())`; or "
            'take executor="placed"'
        )


def _lines_in_branches(text: str) -> list[str]:
    """The lines of the branches of conditionals, and of what they call."""
    computations = _computations(text)
    to_visit = [
        name
        for lines in computations.values()
        for line in lines
        if " conditional(" in line
        for names in _BRANCHES.findall(line)
        for name in _NAME.findall(names)
    ]
    visited: dict[str, Sequence[str]] = {}
    while to_visit:
        name = to_visit.pop()
        if name in visited or name not in computations:
            continue
        visited[name] = computations[name]
        to_visit += [n for line in visited[name] for n in _NAME.findall(line)]
    return [line for lines in visited.values() for line in lines]


def _computations(text: str) -> Mapping[str, list[str]]:
    """The lines of each computation of a program."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            lines = found[begins[1]] = []
        else:
            lines.append(line)
    return found
