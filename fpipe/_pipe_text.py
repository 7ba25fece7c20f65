"""A pipe as text, on one screen.

In: the options and the cut of a pipe, and its layers. Out, for five layers:

    Pipe(
      5 layers (embed, block, block, block, head),
      balance=[2, 3], devices=[cpu:0, cpu:1],
      chunks=8, schedule='eager_1f1b', checkpoint='except_last',
      executor='placed', dispatch='auto'
    )
"""

from collections.abc import Iterable, Sequence
from typing import Any

from fpipe._model.layer import Layer
from fpipe._pipe_arguments import PipeCut, PipeOptions
from fpipe.schedules._checks import counted

# Options that most pipes leave alone are shown only if they have another value.
RARE = {
    "unshard": "step",
    "compute_dtype": None,
    "deferred_batch_norm": False,
    "detect_anomaly": False,
    "recompute": "auto",
    "offload": None,
}


def pipe_text(options: PipeOptions, cut: PipeCut, layers: Iterable[Layer]) -> str:
    """What a pipe is."""
    names = [layer.name for layer in layers]
    places = list(map(str, cut.placements))
    # The same device several times is how a pipeline is tried without more hardware.
    if len(places) > 1 and len(set(places)) == 1:
        places = [f"{places[0]} x {len(places)}"]
    schedule = getattr(options.schedule, "name", options.schedule)
    checkpoint = options.remat.option
    lines = [
        f"{counted(len(names), 'layer')} ({_shortened(names, most=8)})",
        f"balance=[{_shortened(cut.balance, most=16)}], "
        f"devices=[{_shortened(places, most=8)}]",
        f"chunks={options.chunks}, schedule={_named(schedule)!r}, "
        f"checkpoint={_named(checkpoint)!r}",
        f"executor={options.executor!r}, dispatch={options.dispatch!r}",
    ]
    for name, usual in RARE.items():
        if (value := getattr(options, name)) != usual:
            lines[-1] += f", {name}={value!r}"
    return "Pipe(\n  " + ",\n  ".join(lines) + "\n)"


def _named(value: Any) -> Any:
    """The name of a function; other values as they are."""
    return getattr(value, "__name__", value)


def _shortened(values: Sequence[Any], most: int) -> str:
    """A list. If it is long, only its beginning and its end are shown."""
    texts = list(map(str, values))
    if len(texts) > most:
        texts = [*texts[: most - 2], "…", texts[-1]]
    return ", ".join(texts)
