"""The executor of a pipe, and the runner around it.

In: a model, and the options and the cut of a pipe. Out: what runs the model's calls:

    executor="placed"      `Placed`, with a placement for each stage
    executor="scan"        `Scan`, with one mesh over all stages
    detect_anomaly=True    either of them, for a model with checks
"""

from fpipe._core.caches import Recent
from fpipe._executors.anomaly import Detector
from fpipe._executors.eager import Eager
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placement import over_processes
from fpipe._executors.programs import Layout
from fpipe._executors.protocol import Executor
from fpipe._executors.runner import Runner
from fpipe._executors.scan.executor import Scan
from fpipe._executors.sequential import PlainExecutor
from fpipe._model.model import Model
from fpipe._model.stages import cut_stages
from fpipe._pipe_arguments import PipeCut, PipeOptions


def make_executor(
    model: Model, options: PipeOptions, cut: PipeCut, kept: Recent | None = None
) -> Executor:
    """The executor that runs a model.

    Arguments:
        model: the pipe's, or one with as many layers.
        kept: traces and programs that are shared with other pipes of the same layers;
            `None` shares nothing.
    """
    if options.executor == "scan":
        assert cut.mesh is not None, "one was made of the devices"
        return Scan(
            model,
            cut.balance,
            cut.stage_to_device,
            cut.mesh,
            cut.data_axes,
            options.scheduling,
            options.remat,
            options.chunks,
            options.unshard,
            kept,
        )
    # One place for each stage, by the schedule's map.
    layout = Layout(
        cut_stages(model, cut.balance),
        tuple(cut.placements[d] for d in cut.stage_to_device),
        options.unshard,
    )
    return Placed(
        layout,
        options.scheduling,
        cut.stage_to_device,
        options.remat,
        options.chunks,
        options.dispatch,
        kept,
    )


def make_runner(model: Model, options: PipeOptions, cut: PipeCut) -> Runner:
    """What runs the calls of a pipe."""
    # The detector's model is like any other model. Without the option the programs have
    # no checks.
    detector = None
    if options.detect_anomaly:
        apart = options.executor == "placed" and over_processes(cut.placements)
        detector = Detector("Pipe", model, cut.balance, options.chunks, apart)
    runs = model if detector is None else detector.watched
    executor = make_executor(runs, options, cut)
    eager = Eager(executor, PlainExecutor(runs, options.chunks))
    return Runner(executor, PlainExecutor(model, options.chunks), eager, detector)
