"""Train models that others wrote, and compare with plain JAX.

    python -m venv models && models/bin/pip install uv
    models/bin/uv pip install --python models/bin/python -r requirements.txt
    PYTHONPATH=../.. models/bin/python check.py [gpt2 t5 …]
    PYTHONPATH=../.. models/bin/python check.py --page

For each model, executor and schedule: the loss and gradients of one step, the
parameters after three steps of Adam, and a checkpoint that the model's own library
writes and reads. A row is printed for each, with what a step sends between devices and
how long the first ones took; the exit status is 1 if something is not equal.

With `--page` it runs the code of "Your own model" instead: `page.py`.

What a user writes is `train` below: the lines marked with a number, and no others, are
not in the plain loop.
"""

# pyright: basic, reportMissingImports=false

import argparse
import dataclasses
import inspect
import os
import pathlib
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

import jax
import optax
import page
from models import MODELS, RealModel
from plain import PlainStep, difference

import fpipe
import fpipe.optim

CHUNKS = 4
STEPS = 3
CASES = [
    ("placed", "1f1b"),
    ("placed", "zb_h1"),
    ("scan", "1f1b"),
    ("scan", "zb_h1"),
]


def optimizer():
    """Adam, with an `eps` for which rounding of a gradient stays rounding."""
    return optax.adam(1e-3, eps=1e-2)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        loss, grads: of the first step; the loss with the new state, if there is one.
        params: after the last step.
        crossing: bytes that a microbatch's forward sends between devices, with what is
            borrowed.
        split: seconds until parameters are placed.
        first_step: seconds until the first gradients are there.
    """

    loss: Any
    grads: Any
    params: Any
    crossing: int = 0
    split: float = 0.0
    first_step: float = 0.0


def arguments_of(model: RealModel) -> dict[str, Any]:
    """The batch by the names of the loss function's arguments."""
    names = list(inspect.signature(model.loss_fn).parameters)[1:]
    return dict(zip(names, model.batch, strict=True))


def train(model: RealModel, executor: str, schedule: str) -> Trained:
    """Three steps of the pipeline."""
    started = time.perf_counter()
    batch = arguments_of(model)
    step = fpipe.value_and_grad(  # 1
        model.loss_fn,
        devices=jax.devices(),
        chunks=CHUNKS,
        schedule=schedule,
        executor=executor,
    )
    params = step.place(model.params, **batch)  # 2
    split = time.perf_counter() - started
    tx = fpipe.optim.per_stage(optimizer())  # 3
    moments = tx.init(params)
    firsts, seconds = [], 0.0
    for _ in range(STEPS):
        loss, grads = step(params, **batch)
        if "state" in batch:
            batch["state"] = loss[1]
        updates, moments = tx.update(grads, moments, params)
        params = fpipe.optim.apply_updates(params, updates)  # 4
        if not firsts:
            firsts = [jax.device_get((loss, step.gather(grads)))]
            seconds = time.perf_counter() - started
    ((loss, grads),) = firsts
    crossing = sum(
        (row.boundary or 0) + sum(c.bytes for c in row.stashed)
        for row in step.plan(params, **batch).stages
    )
    return Trained(loss, grads, step.gather(params), crossing, split, seconds)  # 5


def plain(model: RealModel) -> Trained:
    """Three steps in plain JAX."""
    batch = arguments_of(model)
    params, tx = model.params, optimizer()
    update = jax.jit(tx.update)
    moments = tx.init(params)
    step = PlainStep(model.loss_fn, CHUNKS)
    firsts = []
    for _ in range(STEPS):
        loss, grads = step(params, batch)
        if "state" in batch:
            batch["state"] = loss[1]
        updates, moments = update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        firsts = firsts or [(loss, grads)]
    ((loss, grads),) = firsts
    return Trained(loss, grads, params)


def main() -> int:
    """Check the models that are named, or all."""
    parser = argparse.ArgumentParser(description="Train models that others wrote.")
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--limit", type=float, default=1e-5)
    parser.add_argument("--notes", action="store_true", help="print warnings")
    parser.add_argument("--page", action="store_true", help="run the page's code")
    arguments = parser.parse_args()
    # Before the first array: two devices, and programs that compile quickly.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax.config.update("jax_num_cpu_devices", 2)
    if arguments.page:
        return min(page.check(arguments.limit), 1)
    print(
        "model                 library       executor  schedule  loss     grads    "
        "3 steps  checkpoint  crossing   split  first step"
    )
    wrong = 0
    for name in arguments.models:
        try:
            model = MODELS[name]()
            want = plain(model)
        except Exception:
            wrong += 1
            print(f"{name}: FAILED without fpipe", flush=True)
            traceback.print_exc()
            continue
        for executor, schedule in CASES:
            title = f"{model.name:20}  {model.library:12}  {executor:8}  {schedule:8}"
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    got = train(model, executor, schedule)
                good = report(title, model, got, want, arguments.limit)
            except Exception:
                good, said = False, []
                print(f"{title}  FAILED", flush=True)
                traceback.print_exc()
            wrong += not good
            if arguments.notes:
                for text in sorted({str(w.message).splitlines()[0] for w in said}):
                    print(f"    {text}", flush=True)
    return min(wrong, 1)


def report(
    title: str, model: RealModel, got: Trained, want: Trained, limit: float
) -> bool:
    """Print a row, and say whether all is equal."""
    loss = difference(got.loss, want.loss)
    grads = difference(got.grads, want.grads)
    steps = difference(got.params, want.params)
    with tempfile.TemporaryDirectory() as folder:
        read = model.saved(got.params, pathlib.Path(folder))
    same = difference(read, got.params) == 0
    # A step carries the rounding of the one before on, and a norm may enlarge it.
    good = same and max(loss, grads) <= limit and steps <= 10 * limit
    print(
        f"{title}  {loss:.1e}  {grads:.1e}  {steps:.1e}  "
        f"{'read back' if same else 'DIFFERENT':10}  {got.crossing:7}B  "
        f"{got.split:5.1f}s  {got.first_step:5.1f}s{'' if good else '  NOT EQUAL'}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
