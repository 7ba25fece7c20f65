"""A stage's graph split into the programs of its actions: `F` and `B`, or `F`, `I`,
`W`, and `R` where a recomputation is an action of its own.

In: the joint graph of a stage, forward and backward together. Out: its programs. For a
stage in the middle, `y = tanh(x @ w)`:

    | program | takes                            | returns                            |
    |---------|----------------------------------|------------------------------------|
    | F       | params[0], x[0]                  | y[0]                               |
    | B       | params[0], x[0], y[0],           | gradient x[0], sum params[0]       |
    |         | cotangent y[0], sum params[0]    |                                    |

or, with a backward in halves,

    | I       | params[0], y[0], cotangent y[0]  | gradient x[0], handed 0            |
    | W       | x[0], handed 0, sum params[0]    | sum params[0]                      |

If a value of the forward that the backward reads already has a name, such as `y[0]`
here, the backward takes it by this name. Only values without a name become residuals.

If the recomputation is an action of its own, `F` keeps only `x[0]`, and

    | R       | params[0], x[0]                  | recomputed 0                       |
    | B       | params[0], x[0], recomputed 0,   | gradient x[0], sum params[0]       |
    |         | cotangent y[0], sum params[0]    |                                    |

What `R` returns for the backward is a cheapest cut too, among all recomputed values.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence, Set

from fpipe._model.stages import FIRST, INDEX, LOSS, Leaf
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
    Recomputed,
    Residual,
    Window,
)
from fpipe._program.control_flow import calls_host, content_dependents
from fpipe._program.graph import Node, dependents, needed_nodes
from fpipe._program.halves import halve_backward
from fpipe._program.host_calls import Guard, Places
from fpipe._program.remats import inline_remats
from fpipe._program.residuals import backward_part, cut_off_backward
from fpipe._program.trace import JointStage
from fpipe.schedules import Kind

_INDEX = Input(Leaf(INDEX, 0))


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """How a stage is split into programs.

    Attributes:
        stage: its number in the pipe, for names and warnings.
        cotangent_counts: how many cotangents each output leaf gets (summed in the
            program); none is zero.
        split_backward: whether the backward is split into `I` and `W`.
        recompute_apart: whether what the backward recomputes is a program of its own,
            `R`.
        inline_remats: whether recomputations are inlined, so that equations in them can
            be told apart; a split backward needs that too.
        loss_cotangent: baked into the last stage's backward.
        returned: output leaves that the user gets: buffers of their own, for the user
            may donate them.
        donated: input leaves that the forward consumes.
        windows: what the programs take whole, and cut their piece out of.
        accumulate: whether constant leaves' gradients are added to a sum that comes in.
        keeps_many: whether residuals of several microbatches are there at a time, so
            that weights among them are worth a warning.
        places: of the pipe, for exceptions in the Python that programs call; `None`:
            the programs will not run.
    """

    stage: int
    cotangent_counts: tuple[tuple[Leaf, int], ...]
    split_backward: bool = False
    recompute_apart: bool = False
    inline_remats: bool = False
    loss_cotangent: float = 1.0
    returned: frozenset[Leaf] = frozenset()
    donated: frozenset[Leaf] = frozenset()
    windows: tuple[tuple[ProgramValue, Window], ...] = ()
    accumulate: bool = False
    keeps_many: bool = True
    places: Places | None = None


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
    joint: JointStage, spec: SplitSpec, compile_code: Compile | None = None
) -> StagePrograms:
    """Split a stage into its programs.

    Arguments:
        compile_code: makes, or finds, the function of a code. Without it the programs
            have codes alone.
    """
    if spec.recompute_apart:
        joint = inline_remats(joint, barriers=False)
    elif spec.split_backward or spec.inline_remats:
        joint = inline_remats(joint)
    splitter = _Splitter(joint, spec, compile_code)
    return StagePrograms(splitter.split(), tuple(splitter.warnings))


class _Splitter:
    """One stage while it is split.

    Attributes:
        names: the names of the values that the backward's programs take, except
            cotangents.
        terms: for each cotangent in the graph those that come in; it is their sum.
        loss: the cotangent of the loss, which is a constant.
    """

    def __init__(
        self, joint: JointStage, spec: SplitSpec, compile_code: Compile | None
    ) -> None:
        self.joint = joint
        self.graph = joint.graph
        self.stage = joint.flat.stage
        self.spec = spec
        self.windows = dict(spec.windows)
        self.compile_code = compile_code
        self.warnings: list[str] = []

        constant = joint.flat.constant
        # What belongs to the backward, and what it takes from the forward. Parameters
        # are the same for all microbatches, and so is what is made from them.
        varying = [v for leaf, v in joint.inputs.items() if leaf not in constant]
        self.per_microbatch = dependents(self.graph, varying)
        cotangents = joint.cotangents.values()
        self.part = backward_part(self.graph, cotangents)
        late = self.part
        if spec.recompute_apart:
            late = backward_part(self.graph, cotangents, recomputed=False)
        # The user's outputs are no names, because the user may donate them before the
        # backward runs.
        outputs: dict[int, ProgramValue] = {
            v: Output(leaf)
            for leaf, v in joint.outputs.items()
            if leaf not in spec.returned
        }
        self.backward = cut_off_backward(
            self.graph,
            joint.gradients.values(),
            late,
            self.per_microbatch,
            outputs.keys(),
        )
        # `R` is cut off the forward in the same way: what the backward takes of it are
        # its results.
        again = self.part.without(late)
        recomputed = [v for v in self.backward.takes if v in again.values]
        self.recomputation = cut_off_backward(
            self.graph, recomputed, again, self.per_microbatch, outputs.keys()
        )
        # Each value that the backward takes by one name. Those that it has anyway come
        # first, so that nothing is kept twice: an input's name wins over an output's.
        self.names = outputs | {v: Input(leaf) for leaf, v in joint.inputs.items()}
        self.recomputed = {v: Recomputed(n) for n, v in enumerate(recomputed)}
        self.names |= self.recomputed
        named = self.names.keys() | joint.cotangents.values()
        # Only what has no name yet is returned by `F` for the backward alone.
        taken = {*self.backward.takes, *self.recomputation.takes}
        self.residuals = sorted(taken - named)
        self.names |= {v: Residual(n) for n, v in enumerate(self.residuals)}
        # If several stages read a leaf, each sends a cotangent. The program takes all
        # of them and adds them, so that additions need no dispatch of their own, and no
        # accumulator.
        counts = dict(spec.cotangent_counts)
        self.terms = {
            v: [Cotangent(leaf, n) for n in range(counts.get(leaf, 0))]
            for leaf, v in joint.cotangents.items()
            if leaf.port != LOSS
        }
        self.loss = joint.cotangents.get(Leaf(LOSS, 0))

    def split(self) -> dict[Kind, Program]:
        """The programs by kind."""
        programs: dict[Kind, Program] = {"F": self._forward()}
        if self.spec.keeps_many:
            self._warn_of_kept_weights()
        # Gradients of what is the same for all microbatches are summed over them (those
        # of states, which are their new values, go into a maximum). The others go out,
        # one for each microbatch.
        returned: dict[ProgramValue, int] = {}
        summed: list[Leaf] = []
        for leaf, v in self.joint.gradients.items():
            if leaf in self.joint.flat.constant:
                summed.append(leaf)
            else:
                returned[Gradient(leaf)] = v
        if self.recomputation.nodes:
            given: dict[ProgramValue, int] = {
                name: v for v, name in self.recomputed.items()
            }
            programs["R"] = self._backward("R", self.recomputation.nodes, given, [])
        if returned or summed:
            if self.spec.split_backward:
                programs |= self._halves(returned, summed)
            else:
                nodes = self.backward.nodes
                programs["B"] = self._backward("B", nodes, returned, summed)
        return programs

    def _halves(
        self, returned: Mapping[ProgramValue, int], summed: Sequence[Leaf]
    ) -> dict[Kind, Program]:
        """The programs of `I` and of `W`, if there is something for them to do."""
        gradients = self.joint.gradients
        cotangents = self.joint.cotangents.values()
        halves = halve_backward(
            self.graph,
            self.backward,
            input_gradients=list(returned.values()),
            weight_gradients=[gradients[leaf] for leaf in summed],
            summed={v for v, terms in self.terms.items() if len(terms) > 1},
            per_microbatch=self.per_microbatch | dependents(self.graph, cotangents),
        )
        early = [leaf for leaf in summed if gradients[leaf] in halves.made_early]
        if early:
            self.warnings.append(
                f"stage {self.spec.stage}: I makes {len(early)} of its {len(summed)} "
                "weight gradients, and W the rest, because one equation (a lax.scan, a "
                "lax.cond, a custom call) gives them together with an input gradient; "
                "a schedule that delays W gains less here"
            )
        # A stage whose input has no gradient, the first one for example, has no `I`,
        # and one whose weight gradients are all made early has no `W`.
        programs: dict[Kind, Program] = {}
        handed = {v: Handed(n) for n, v in enumerate(halves.handed)}
        if halves.input_nodes or returned:
            given = {**returned, **{name: v for v, name in handed.items()}}
            programs["I"] = self._backward("I", halves.input_nodes, given, early)
        if len(early) < len(summed):
            self.names |= handed
            late = [leaf for leaf in summed if leaf not in early]
            programs["W"] = self._backward("W", halves.weight_nodes, {}, late)
        return programs

    def _warn_of_kept_weights(self) -> None:
        """Find residuals whose content comes from parameters alone.

        Control flow is one equation, and hides such values: a cast of the weights
        inside a scan is stacked by it, and kept with the activations. An equation
        cannot be cut in two here, so the user is told.
        """
        # A state that is the same for all microbatches is like a parameter.
        kinds = {
            leaf: "params"
            if leaf.port.kind == "state" and leaf in self.joint.flat.constant
            else leaf.port.kind
            for leaf in self.joint.inputs
        }
        inputs = self.joint.inputs.items()
        nodes = needed_nodes(self.graph, self.residuals)
        others = [
            v for leaf, v in inputs if kinds[leaf] not in ("params", "key", "number")
        ]
        varying = content_dependents(nodes, others)
        suspects = [
            v
            for v in self.residuals
            if v not in varying and self.graph.avals[v].size > 1
        ]
        if not suspects:
            return
        params = [v for leaf, v in inputs if kinds[leaf] == "params"]
        from_params = content_dependents(nodes, params)
        self.warnings += [
            f"stage {self.spec.stage} keeps {self.graph.avals[v].str_short()} per "
            "microbatch, made from parameters alone inside a lax.scan or lax.cond; "
            "make it outside (cast the stacked parameters before the scan, for "
            "example), or use checkpoint='always'"
            for v in suspects
            if v in from_params
        ]

    def _forward(self) -> Program:
        joint = self.joint
        # An output that is an input as it is, a boundary that a layer passes on for
        # example, is no output of the program: `jit` would copy it. The user's outputs
        # are outputs all the same, because the user needs a copy.
        inputs: dict[ProgramValue, int] = {
            Input(leaf): v for leaf, v in joint.inputs.items()
        }
        passed_on: dict[ProgramValue, int] = {}
        for_user: dict[ProgramValue, int] = {}
        for leaf, v in joint.outputs.items():
            to_user = leaf in self.spec.returned
            (for_user if to_user else passed_on)[Output(leaf)] = v
        passed_on |= {Residual(n): v for n, v in enumerate(self.residuals)}
        outs, aliases = self._separate_aliases(passed_on, inputs)
        outs |= for_user
        # The program runs what its outputs and residuals need. Values that only the
        # backward reads, and makes again, are not computed here.
        effects = {
            node
            for node in self.graph.nodes
            if node.eqn.effects and node not in self.part.nodes
        }
        nodes = needed_nodes(self.graph, outs.values(), required=effects)
        read = {v for node in nodes for v in node.ins}.union(outs.values())
        ins = {name: v for name, v in inputs.items() if v in read}
        # A state enters a layer through `stop_gradient`, so that no later stage reads
        # that array itself under another name.
        consumed = {Input(leaf) for leaf in self.spec.donated}
        assert consumed.isdisjoint(aliases.values())
        return self._program("F", nodes, ins, {}, outs, aliases, [], consumed)

    def _backward(
        self,
        kind: Kind,
        nodes: Sequence[Node],
        returned: Mapping[ProgramValue, int],
        summed: Sequence[Leaf],
    ) -> Program:
        """A backward, half of one, or what it recomputes.

        Arguments:
            returned: what goes out as it is.
            summed: the leaves whose gradients are added up.
        """
        sums = [self.joint.gradients[leaf] for leaf in summed]
        made = {v for node in nodes for v in node.outs}
        read = {v for node in nodes for v in node.ins}.union(returned.values(), sums)
        # Everything that is read and not made here comes in by its name, or is
        # constant: the cotangent of the loss, and those of outputs that no one
        # differentiates, which are 0.
        ins: dict[ProgramValue, int] = {}
        constants: dict[int, float] = {}
        for v in sorted(read - made - self.graph.consts.keys()):
            if v in self.names:
                ins[self.names[v]] = v
            elif v == self.loss:
                constants[v] = self.spec.loss_cotangent
            elif self.terms[v]:
                ins |= dict.fromkeys(self.terms[v], v)
            else:
                constants[v] = 0.0
        # If a returned value is one of the arguments, it needs no array of its own. A
        # value for the user does, because the user may donate it.
        passed_on: dict[ProgramValue, int] = {}
        for_user: dict[ProgramValue, int] = {}
        for name, v in returned.items():
            (passed_on if self._stays_inside(name) else for_user)[name] = v
        outs, aliases = self._separate_aliases(passed_on, ins)
        outs |= for_user
        return self._program(kind, nodes, ins, constants, outs, aliases, summed)

    def _stays_inside(self, name: ProgramValue) -> bool:
        """Whether a value is for another stage, or for another program of this one."""
        if not isinstance(name, Gradient):
            return True
        kind = name.leaf.port.kind
        return kind == "skip" or (kind == "x" and self.stage.index > 0)

    def _separate_aliases(
        self, values: Mapping[ProgramValue, int], ins: Mapping[ProgramValue, int]
    ) -> tuple[dict[ProgramValue, int], dict[ProgramValue, ProgramValue]]:
        """The names of new values, and those of values that have a name already.

        An argument that is a term of a sum, or a whole array, is not yet the graph's
        value. The program makes that value, and so it needs a place.
        """
        counts = collections.Counter(ins.values())
        first_name = {
            v: name
            for name, v in ins.items()
            if counts[v] == 1 and name not in self.windows
        }
        new: dict[ProgramValue, int] = {}
        aliases: dict[ProgramValue, ProgramValue] = {}
        for name, v in values.items():
            if v in first_name:
                aliases[name] = first_name[v]
            else:
                first_name[v] = name
                new[name] = v
        return new, aliases

    def _program(
        self,
        kind: Kind,
        nodes: Sequence[Node],
        ins: Mapping[ProgramValue, int],
        constants: Mapping[int, float],
        outs: Mapping[ProgramValue, int],
        aliases: Mapping[ProgramValue, ProgramValue],
        summed: Sequence[Leaf],
        consumed: Set[ProgramValue] = frozenset(),
    ) -> Program:
        # Where a window is cut out of a whole batch, the number of the microbatch says
        # which, so the program takes it, also where no layer asks for a key.
        names = list(ins)
        args = [Arg(v, self.windows.get(name)) for name, v in ins.items()]
        calls = calls_host(nodes)
        places = self.spec.places if calls else None
        if (places or any(arg.window for arg in args)) and _INDEX not in ins:
            names.append(_INDEX)
            args.append(Arg(None))
        # So does a program that calls Python, to say where if that raises.
        guard = None
        if places is not None:
            names.append(Input(Leaf(FIRST, 0)))
            args.append(Arg(None))
            guard = Guard(
                kind,
                places,
                self.stage.span.start,
                first=len(names) - 1,
                index=names.index(_INDEX),
            )
        # Sums come last, as arguments and as results: so they can be donated as one
        # range.
        sums = [GradientSum(leaf) for leaf in summed]
        code = Code(
            kind=kind,
            graph=self.graph,
            nodes=tuple(nodes),
            args=tuple(args),
            index=names.index(_INDEX) if _INDEX in names else None,
            constants=tuple(constants.items()),
            outs=tuple(outs.values()),
            sums=tuple(self.joint.gradients[leaf] for leaf in summed),
            accumulate=self.spec.accumulate,
            guard=guard,
            maxima=tuple(
                n for n, leaf in enumerate(summed) if leaf.port.kind == "state"
            ),
            donated=tuple(n for n, name in enumerate(names) if name in consumed),
        )
        runs = bool(nodes or outs or sums)
        return Program(
            name=f"stage{self.spec.stage}_{kind}",
            code=code if runs else None,
            call=self.compile_code(code) if runs and self.compile_code else None,
            ins=(*names, *(sums if self.spec.accumulate else ())),
            outs=(*outs, *sums),
            aliases=aliases,
            calls_host=calls,
        )
