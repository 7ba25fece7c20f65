"""What the costs of layers, and the balance made of them, say that a pipe keeps, beside
what its plan holds.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._executors.placed.instructions import Run
from fpipe._executors.scheduling import Scheduling
from fpipe._planning.span_tables import SpanTables
from tests.executors.helpers import observing, plan_of
from tests.helpers import Case, in_turn, models
from tests.planning.test_balance import spans


def held(pipe, step):
    """For each device and moment the bytes that the plan holds there, after each
    action.
    """
    step()
    plan = plan_of(pipe)
    names = [str(device) for device in pipe.devices]
    outside = ("key", "side", "targets", "loss", "index", "number")
    moments = []

    def look(item, slots):
        now = [{} for _ in pipe.devices]
        for slot, a in zip(plan.slots, slots, strict=True):
            if (
                isinstance(a, jax.Array)
                and not a.is_deleted()
                and not slot.name.startswith(outside)
            ):
                now[names.index(str(slot.placement))][id(a)] = (
                    slot.name,
                    a.nbytes,
                )
        moments.append(
            (item.actions[0].kind if isinstance(item, Run) and item.parts else "", now)
        )

    with observing(look):
        step()
    return moments


@pytest.mark.parametrize(
    ("name", "balance"),
    [
        ("plain", [1, 3]),
        ("branched", [1, 2, 1]),
        ("dropout", [2, 2]),
        ("nested", [2, 3]),
        ("stateful", [3, 1]),
        ("sided", [1, 3]),
    ],
)
def test_residuals_are_what_the_plan_keeps(name, balance):
    layers = models()[name]
    case = Case(layers, chunks=5)
    pipe = fpipe.Pipe(layers, balance, chunks=5, checkpoint="never", schedule="gpipe")
    params, run = pipe.place(case.params()), pipe.value_and_grad(jnp.sum)
    moments = held(pipe, lambda: run(params, case.x, **case.needs))
    before = list(itertools.takewhile(lambda moment: moment[0] != "B", moments))
    forwards = [now for kind, now in before if kind == "F"]
    assert len(forwards) == 5 * len(balance)
    now = forwards[-1]
    kept = [
        sum(
            n for what, n in d.values() if not what.startswith(("params", "x", "state"))
        )
        for d in now
    ]
    known = fpipe.layer_costs(layers, case.x, chunks=5, side=case.side)
    want = [
        5 * (sum(known.residuals[i:j]) - sum(known.shared[i : j - 1]))
        for i, j in spans(balance)
    ]
    assert kept == want


@pytest.mark.parametrize(
    ("schedule", "checkpoint"),
    in_turn(["gpipe", "1f1b", "eager_1f1b"], ["never", "always", "except_last"]),
)
def test_a_pipe_holds_no_more_than_the_balance_says(schedule, checkpoint):
    layers, balance = models()["jump2"], [1, 1, 2]
    case = Case(layers, chunks=5)
    pipe = fpipe.Pipe(
        layers, balance, chunks=5, checkpoint=checkpoint, schedule=schedule
    )
    params, run = pipe.place(case.params()), pipe.value_and_grad(jnp.sum)
    moments = held(pipe, lambda: run(params, case.x, **case.needs))
    most = [
        max(sum(n for _, n in now[d].values()) for _, now in moments) for d in range(3)
    ]
    known = fpipe.layer_costs(layers, case.x, chunks=5, checkpoint=checkpoint)
    tables = SpanTables(known, (0, 1, 2), Scheduling.of(schedule), 0.0)
    for s, (i, j) in enumerate(spans(balance)):
        says = tables.memory(s)[i, j]
        inside = (
            0 if checkpoint == "never" else 2 * sum(known.residuals[i:j])
        )  # recomputed within a program
        ends = (
            2
            * (tables.before + tables.after + tables.skips_in + tables.skips_out)[i, j]
        )
        there = (
            sum(tables.holding(s).arrived) * 2 * 4 * 4
        )  # the other executor's places to wait
        assert most[s] <= says <= most[s] + inside + ends + there
