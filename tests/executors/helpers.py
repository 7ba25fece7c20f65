"""What tests of the executors see of them from within: the executor of a pipe, its
plan, and the instructions that it issues.
"""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._executors.placed import lower
from fpipe._executors.placed.compile import compile_plan
from fpipe._executors.placed.dispatch import ReadyPlan
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placed.instructions import Plan, Run
from fpipe._executors.placed.threads import Crew
from fpipe._executors.scan.executor import Scan
from fpipe._executors.scan.machine import Machine


def placed_executor(pipe: fpipe.Pipe) -> Placed:
    """The placed executor of a pipe."""
    assert isinstance(pipe._executor, Placed)
    return pipe._executor


def scan_executor(pipe: fpipe.Pipe) -> Scan:
    """The scan executor of a pipe."""
    assert isinstance(pipe._executor, Scan)
    return pipe._executor


def plan_of(pipe: fpipe.Pipe) -> Plan:
    """The first of the plans that a placed pipe has made."""
    return placed_executor(pipe)._plans.values()[0].plan


def collectives(pipe):
    """How often a step runs each collective, by its kind and the program's kind: of the
    compiled programs, each as often as it runs. Those of single numbers (a loss) are
    not counted.
    """
    bound = placed_executor(pipe)._plans.values()[-1]
    counts = Counter()
    for n, program in compile_plan(bound.plan, bound.shapes).items():
        run = bound.plan.instructions[n]
        assert isinstance(run, Run)
        name = "".join(action.kind for action in run.actions) or run.name
        for line in (program.as_text() or "").splitlines():
            found = re.search(
                r" = (.*) (all-reduce|all-gather|all-to-all|reduce-scatter|"
                r"collective-permute)(-start)?\(",
                line,
            )
            if found and re.search(r"\[\d", found[1]):
                counts[name, found[2]] += 1
    return counts


def machine_of(pipe: fpipe.Pipe) -> Machine:
    """The last of the machines that a scan pipe has made."""
    return scan_executor(pipe)._steps.values()[-1].machine


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Each action of the plans that are made meanwhile has a program of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "fuse", lambda work, *_: list(work))
        yield


@contextlib.contextmanager
def observing(look: Callable[[Any, list[Any]], None]) -> Iterator[None]:
    """Call `look(instruction, slots)` after each step that placed pipes issue
    meanwhile, with the slots of the thread that issues it; one call at a time.
    """
    one_at_a_time = threading.Lock()
    issue_all, issue_in_thread = ReadyPlan.issue, Crew.issue

    def observed(plan, shares, slots):
        if plan.threaded:
            issue_all(plan, shares, slots)
            return
        for share in shares:
            for step in share.steps:
                issue_all(plan, [share._replace(steps=(step,))], slots)
                look(step.item, slots)

    def observed_in_thread(crew, step, slots):
        issue_in_thread(crew, step, slots)
        with one_at_a_time:
            look(step.item, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadyPlan, "issue", observed)
        patch.setattr(Crew, "issue", observed_in_thread)
        yield


def products(
    layers: Any,
    checkpoint: Any,
    schedule: Any = "gpipe",
    balance: Any = None,
    chunks: int = 4,
    wrt: Any = 0,
    width: int = 8,
) -> Counter[tuple[str, int]]:
    """Matrix products of a training step by (kind, stage), in the compiled programs
    that it runs where each action has one of its own.
    """
    balance = [1] * len(layers) if balance is None else balance
    pipe = fpipe.Pipe(
        layers, balance, chunks=chunks, checkpoint=checkpoint, schedule=schedule
    )
    x = jnp.ones((2 * chunks, width))
    params = pipe.init(jax.random.key(0), x)
    with unfused():
        pipe.compile(params, x, loss_fn=lambda y: jnp.mean(y**2), argnums=wrt)
    bound = placed_executor(pipe)._plans.values()[0]
    counts: Counter[tuple[str, int]] = Counter()
    for n, program in compile_plan(bound.plan, bound.shapes).items():
        item = bound.plan.instructions[n]
        assert isinstance(item, Run)
        for action in item.actions:
            counts[action.kind, action.stage] += program.as_text().count(" dot(")
    return counts
