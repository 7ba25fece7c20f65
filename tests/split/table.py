"""A table of models: each one split, and run under both executors by some schedules.

    python -m tests.split.table

prints for each run whether loss, gradients and outputs are those of the function
itself, microbatch by microbatch, and then the table of `docs/split.md`. It takes some
minutes; the tests take one schedule for each model and executor.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

import fpipe
from tests.helpers import assert_same
from tests.split.models import (
    EXAMPLES,
    Example,
    batch_norm,
    loss,
    plain,
    stacked_norms,
)

EXECUTORS = ("placed", "scan")
MODELS = {**EXAMPLES, "batch_norm": batch_norm, "stacked_norms": stacked_norms}

# What the page calls them.
TITLES = {
    "residual_mlp": "an MLP with residuals",
    "u_net": "a U-Net",
    "gpt": "a GPT with a tied embedding, a mask and dropout",
    "two_inputs": "two inputs, side inputs, a dict of outputs",
    "scanned": "a scan over four checkpointed blocks, with dropout",
    "encoder_decoder": "an encoder and a decoder with one bias",
    "integers": "integers between pieces",
    "batch_norm": "batch norms with state and dropout",
    "stacked_norms": "a scan over four layers with stacked state",
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule on two devices.

    Attributes:
        stages: how many it has, which is the least number of pieces.
    """

    name: str
    stages: int = 2


SCHEDULES = (
    Schedule("1f1b"),
    Schedule("zb_h1"),
    Schedule("interleaved_1f1b", 4),
    Schedule("zb_v", 4),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        crossing: the bytes that pieces read of others, of one microbatch.
        seconds: to split the function.
        wrong: what is not equal; `""`: all is.
    """

    model: str
    executor: str
    schedule: str
    pieces: int
    crossing: int
    seconds: float
    wrong: str


def crossing_bytes(split: fpipe.Split) -> int:
    """The bytes that pieces read of others, of one microbatch."""
    trace = split.cut.trace(split.cut.first)
    return sum(trace.bytes_of(list(piece.takes)) for piece in trace.pieces)


def reference_of(example: Example) -> Any:
    """Loss, outputs and gradients of the function, by microbatches of two rows."""
    step = jax.value_and_grad(lambda p: plain(example, p, 2), has_aux=True)
    (value, y), grads = jax.jit(step)(example.params)
    return value, y, grads


def step_of(example: Example, split: fpipe.Split, executor: str, name: str) -> Any:
    """The same of a pipe on two devices, in six rows by twos."""
    pipe = fpipe.Pipe(
        split, devices=jax.devices()[:2], chunks=3, executor=executor, schedule=name
    )
    placed, needs = pipe.place(example.params), dict(example.needs)
    if example.state is not None:
        needs["state"] = example.state
    value, grads = pipe.value_and_grad(loss)(placed, example.x, **needs)
    y = pipe(placed, example.x, **needs)
    if example.state is not None:
        value, state = value
        y = y[0], pipe.gather_state(y[1])
        assert_same(pipe.gather_state(state), y[1])
    return value, jax.device_get(y), pipe.gather(grads)


def measured(name: str) -> Iterator[Row]:
    """The rows of a model."""
    example = MODELS[name]()
    begin = time.perf_counter()
    split = example.split()
    seconds = time.perf_counter() - begin
    want = reference_of(example)
    for executor, schedule in itertools.product(EXECUTORS, SCHEDULES):
        if len(split) < schedule.stages:
            continue
        wrong = ""
        try:
            assert_same(step_of(example, split, executor, schedule.name), want)
        except (AssertionError, TypeError, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
        crossing = crossing_bytes(split)
        yield Row(name, executor, schedule.name, len(split), crossing, seconds, wrong)


def main(names: list[str]) -> None:
    """Print the table of some models, or of all."""
    jax.config.update("jax_num_cpu_devices", 2)
    form = "{:16} {:8} {:17} {:>5} {:>6} {:>8} {:>7}"
    head = ("model", "executor", "schedule", "equal", "pieces", "crossing", "split")
    print(form.format(*head))
    lines = []
    for name in names or MODELS:
        rows = list[Row]()
        for row in measured(name):
            rows.append(row)
            equal = "no" if row.wrong else "yes"
            sizes = (row.pieces, f"{row.crossing} B", f"{row.seconds:.2f} s")
            cells = (name, row.executor, row.schedule, equal, *sizes)
            print(form.format(*cells), flush=True)
            if row.wrong:
                print(f"    {row.wrong}")
        lines.append(_line(name, rows))
    print(
        "\n| model | pieces | bytes between pieces | runs | equal | seconds to split |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


def _line(name: str, rows: list[Row]) -> str:
    """A model's line in the page."""
    equal = sum(not row.wrong for row in rows)
    every = "all" if equal == len(rows) else str(equal)
    one = rows[0]
    cells = (one.pieces, one.crossing, len(rows), every, f"{one.seconds:.2f}")
    return f"| {TITLES[name]} | {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main(sys.argv[1:])
