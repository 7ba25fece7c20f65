"""A stage's graph cut into the programs of its actions: `F` and `B`, or `F`, `I` and
`W`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from fpipe._model.stages import INDEX, LOSS, Leaf
from fpipe._program.code import (
    Arg,
    Code,
    Compile,
    Cotangent,
    Gradient,
    GradientSum,
    Handed,
    Input,
    Output,
    Program,
    ProgramValue,
    Residual,
    Window,
)
from fpipe._program.control_flow import calls_host, sources
from fpipe._program.graph import Node, is_late, late_values, masks, needed
from fpipe._program.residuals import halves, opened, residuals
from fpipe._program.trace import JointStage
from fpipe.schedules import Kind

INDEX_INPUT = Input(Leaf(INDEX, 0))


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """How a stage is split into programs.

    Attributes:
        cotangent_counts: how many cotangents each output leaf gets (summed in the
            program); none is zero.
        split_backward: whether the backward is split into `I` and `W`.
        inline_remats: whether recomputations are inlined, so that equations in them can
            be told apart; a split backward needs that too.
        loss_cotangent: baked into the last stage's backward.
        returned: output leaves that the user gets: buffers of their own, for the user
            may donate them.
        windows: what the programs take whole, and cut their piece out of.
        accumulate: whether constant leaves' gradients are added to a sum that comes in.
    """

    cotangent_counts: tuple[tuple[Leaf, int], ...]
    split_backward: bool = False
    inline_remats: bool = False
    loss_cotangent: float = 1.0
    returned: frozenset[Leaf] = frozenset()
    windows: tuple[tuple[ProgramValue, Window], ...] = ()
    accumulate: bool = False


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """The programs of a stage for microbatches of one shape.

    Attributes:
        by_kind: what has nothing to compute is not there.
        warnings: what the user should know.
    """

    by_kind: Mapping[Kind, Program]
    warnings: tuple[str, ...]


def split_stage(
    joint: JointStage,
    spec: SplitSpec,
    compile_code: Compile | None = None,
) -> StagePrograms:
    """Split a stage into its programs.

    Arguments:
        compile_code: makes, or finds, the function of a code. Without it the programs
            have codes alone.
    """
    return _Cut(
        _opened(joint) if spec.split_backward or spec.inline_remats else joint,
        spec,
        compile_code,
    ).programs()


def _opened(joint: JointStage) -> JointStage:
    """The joint graph with its recomputations inlined."""
    graph, new = opened(joint.graph, joint.cotangents.values())
    outputs, gradients = (
        {leaf: new.get(v, v) for leaf, v in values.items()}
        for values in (joint.outputs, joint.gradients)
    )
    return dataclasses.replace(joint, graph=graph, outputs=outputs, gradients=gradients)


class _Cut:
    """One stage while it is cut: the values of its graph, and what they are called
    between programs.
    """

    def __init__(
        self, joint: JointStage, spec: SplitSpec, compile_code: Compile | None
    ) -> None:
        self.joint, self.graph, self.stage = joint, joint.graph, joint.flat.stage
        self.spec, self.windows, self.compile_code = (
            spec,
            dict(spec.windows),
            compile_code,
        )
        constant, cotangents = joint.flat.constant, set(joint.cotangents.values())
        self.late = late_values(self.graph, cotangents)
        self.micro = masks(
            self.graph,
            {v: 1 for leaf, v in joint.inputs.items() if leaf not in constant},
        )
        self.nodes, self.take = residuals(
            self.graph, list(joint.gradients.values()), self.late, self.micro
        )
        names = {
            v: Output(leaf)
            for leaf, v in joint.outputs.items()
            if leaf not in spec.returned
        }
        names |= {v: Input(leaf) for leaf, v in joint.inputs.items()}
        self.residuals = [
            v for v in self.take if v not in names and v not in cotangents
        ]
        self.names = names | {v: Residual(n) for n, v in enumerate(self.residuals)}
        counts = dict(spec.cotangent_counts)
        self.terms = {
            v: [Cotangent(leaf, n) for n in range(counts.get(leaf, 0))]
            for leaf, v in joint.cotangents.items()
            if leaf.port != LOSS
        }
        self.loss = {v for leaf, v in joint.cotangents.items() if leaf.port == LOSS}

    def programs(self) -> StagePrograms:
        """All that there are."""
        gradients, constant = self.joint.gradients, self.joint.flat.constant
        sums = [leaf for leaf in gradients if leaf in constant]
        each: dict[ProgramValue, int] = {
            Gradient(leaf): v for leaf, v in gradients.items() if leaf not in constant
        }
        of: dict[Kind, Program] = {"F": self._forward()}
        warnings = self._weights_kept()
        if not gradients:
            return StagePrograms(of, tuple(warnings))
        if not self.spec.split_backward:
            of["B"] = self._backward("B", self.nodes, each, sums)
            return StagePrograms(of, tuple(warnings))
        given = {v: len(self.terms.get(v, ())) < 2 for v in self.take}
        micro = masks(
            self.graph, self.micro | dict.fromkeys(self.joint.cotangents.values(), 1)
        )
        first, second, handed, both = halves(
            self.graph,
            self.nodes,
            list(each.values()),
            [gradients[leaf] for leaf in sums],
            given,
            micro,
        )
        early = [leaf for leaf in sums if gradients[leaf] in both]
        if early:
            warnings.append(
                f"stage {self.stage.index}: I makes {len(early)} of its {len(sums)} "
                "weight gradients, and W the rest, for "
                "one equation (a lax.scan, a lax.cond, a custom call) gives them "
                "together with an input gradient; a "
                "schedule that delays W gains less here"
            )
        shared: dict[ProgramValue, int] = {Handed(n): v for n, v in enumerate(handed)}
        if first or each:
            of["I"] = self._backward("I", first, each | shared, early)
        self.names |= {v: ref for ref, v in shared.items()}
        if len(early) < len(sums):
            of["W"] = self._backward(
                "W", second, {}, [leaf for leaf in sums if leaf not in early]
            )
        return StagePrograms(of, tuple(warnings))

    def _weights_kept(self) -> list[str]:
        """Handed-over arrays whose content comes from parameters alone: control flow is
        one equation, and hides it.
        """
        params, other = 1, 2
        kinds = {"params": params, "key": 0, "number": 0}
        found = sources(
            self.graph,
            {
                v: kinds.get(leaf.port.kind, other)
                for leaf, v in self.joint.inputs.items()
            },
        )
        return [
            f"stage {self.stage.index} keeps {self.graph.avals[v].str_short()} per "
            "microbatch, made from parameters alone "
            "inside a lax.scan or lax.cond; make it outside (cast the stacked "
            "parameters before the scan, for example), or "
            "use checkpoint='always'"
            for v in self.residuals
            if found.get(v, 0) == params and self.graph.avals[v].size > 1
        ]

    def _forward(self) -> Program:
        joint, graph = self.joint, self.graph
        values: dict[ProgramValue, int] = {
            Output(leaf): v for leaf, v in joint.outputs.items()
        }
        values |= {Residual(n): v for n, v in enumerate(self.residuals)}
        own = [Output(leaf) for leaf in joint.outputs if leaf in self.spec.returned]
        known = {
            v: Input(leaf)
            for leaf, v in joint.inputs.items()
            if Input(leaf) not in self.windows
        }
        outs, same = _unrepeated(
            {ref: v for ref, v in values.items() if ref not in own}, known
        )
        outs = (*outs, *own)
        wanted = [values[ref] for ref in outs]
        nodes = needed(graph, wanted, effects=lambda node: not is_late(node, self.late))
        used = {v for node in nodes for v in node.ins} | set(wanted)
        ins: dict[ProgramValue, int] = {
            Input(leaf): v for leaf, v in joint.inputs.items() if v in used
        }
        return self._program("F", nodes, ins, {}, wanted, outs, same, [])

    def _backward(
        self,
        kind: Kind,
        nodes: Sequence[Node],
        each: Mapping[ProgramValue, int],
        leaves: Sequence[Leaf],
    ) -> Program:
        """A backward, or half of one: `each` goes out as it is, the gradients of
        `leaves` are summed.
        """
        made = {v for node in nodes for v in node.outs}
        wanted = [*each.values(), *(self.joint.gradients[leaf] for leaf in leaves)]
        ins: dict[ProgramValue, int] = {}
        fills: dict[int, float] = {}
        for v in sorted(
            ({v for node in nodes for v in node.ins} | set(wanted))
            - made
            - set(self.graph.consts)
        ):
            if v in self.names:
                ins[self.names[v]] = v
            elif v in self.loss:
                fills[v] = self.spec.loss_cotangent
            elif self.terms[v]:
                ins |= dict.fromkeys(self.terms[v], v)
            else:
                fills[v] = 0.0
        # What goes out and comes in alike goes through as it is, except to the user,
        # who may donate it.
        counts = list(ins.values())
        known = {
            v: ref
            for ref, v in ins.items()
            if counts.count(v) == 1 and ref not in self.windows
        }
        inner, same = _unrepeated(
            {ref: v for ref, v in each.items() if self._stays_inside(ref)}, known
        )
        outs = (*inner, *(ref for ref in each if not self._stays_inside(ref)))
        return self._program(
            kind, nodes, ins, fills, [each[ref] for ref in outs], outs, same, leaves
        )

    def _stays_inside(self, ref: ProgramValue) -> bool:
        """Whether it is for another stage, or for another program of this one."""
        if not isinstance(ref, Gradient):
            return True
        kind = ref.leaf.port.kind
        return kind == "skip" or (kind == "x" and self.stage.index > 0)

    def _program(
        self,
        kind: Kind,
        nodes: Sequence[Node],
        ins: Mapping[ProgramValue, int],
        fills: Mapping[int, float],
        wanted: Sequence[int],
        outs: Sequence[ProgramValue],
        same: Mapping[ProgramValue, ProgramValue],
        leaves: Sequence[Leaf],
    ) -> Program:
        refs, args = (
            list(ins),
            [Arg(v, self.windows.get(ref)) for ref, v in ins.items()],
        )
        if any(arg.window for arg in args) and INDEX_INPUT not in ins:
            refs.append(INDEX_INPUT)
            args.append(Arg(None))
        code = Code(
            kind,
            self.graph,
            tuple(nodes),
            tuple(args),
            refs.index(INDEX_INPUT) if INDEX_INPUT in refs else None,
            tuple(fills.items()),
            tuple(wanted),
            tuple(self.joint.gradients[leaf] for leaf in leaves),
            self.spec.accumulate,
        )
        sums = [GradientSum(leaf) for leaf in leaves]
        runs = bool(nodes or wanted or sums)
        return Program(
            f"stage{self.stage.index}_{kind}",
            code if runs else None,
            self.compile_code(code) if runs and self.compile_code else None,
            (*refs, *(sums if self.spec.accumulate else ())),
            (*outs, *sums),
            same,
            calls_host(nodes),
        )


def _unrepeated(
    values: Mapping[ProgramValue, int], known: Mapping[int, ProgramValue]
) -> tuple[tuple[ProgramValue, ...], dict[ProgramValue, ProgramValue]]:
    """The refs whose values are new, and the others with the ref that has their value
    already.
    """
    first, outs, same = (
        dict(known),
        list[ProgramValue](),
        dict[ProgramValue, ProgramValue](),
    )
    for ref, v in values.items():
        if v in first:
            same[ref] = first[v]
        else:
            first[v] = ref
            outs.append(ref)
    return tuple(outs), same
