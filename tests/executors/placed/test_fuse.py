"""Neighbours that run as one program: how many launches a step has, what is fused and
what is not, and that nothing else changes.
"""

import collections
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fpipe
from fpipe._executors.placed.instructions import Copy, Move, Run
from tests.executors.helpers import plan_of, unfused
from tests.front.test_equal import check
from tests.helpers import Case, assert_same, dense, models, mse

M = 4


def planned(layers, schedule, argnums=(0, 1), devices=None, chunks=M, **options):
    """The pipe and the plan of a training step; nothing is compiled."""
    several = fpipe.schedules.NAMES[schedule].per_device != 1
    count = len(layers) // 2 if several else len(layers)
    devices = jax.devices()[:count] if devices is None else devices
    options = {"checkpoint": "never", **options}
    pipe = fpipe.Pipe(
        layers, [1] * len(layers), devices, chunks, schedule=schedule, **options
    )
    x = jnp.ones((2 * chunks, 4))
    params = tuple(jnp.eye(4) for _ in layers)
    plan = pipe.plan(params, x, loss_fn=jnp.mean, argnums=argnums)
    return pipe, plan


def kinds(pipe):
    """What each program of the schedule runs, and how often: `F3 B3`."""
    found: collections.Counter[str] = collections.Counter()
    for item in plan_of(pipe).instructions:
        if isinstance(item, Run) and item.parts:
            found[" ".join(f"{k}{s}" for k, s, _ in item.actions)] += 1
    return {name: count for name, count in found.items() if " " in name}


LAYERS = [fpipe.Layer(lambda w, x: jnp.tanh(x @ w), name="dense")] * 4

# For each schedule what runs as one program, and how often, with four microbatches.
FUSED = {
    # The last stage's backward comes long after its forward.
    "gpipe": {},
    "1f1b": {"F3 B3": 4},
    "eager_1f1b": {"F3 B3": 4},
    "interleaved_1f1b": {"F3 B3": 4},
    # Nobody waits for the gradient of `x`, so on the first stage both halves are one.
    "zb_h1": {"F3 I3": 4, "I0 W0": 4},
    # Two stages that follow each other on a device: there and back.
    "v_min": {"F3 I3": 4, "I0 W0": 4, "F1 F2": 4, "I2 I1": 4, "W2 W1": 4},
}


@pytest.mark.quick
@pytest.mark.parametrize("schedule", FUSED)
def test_what_is_fused_and_how_many_launches_that_saves(schedule):
    pipe, plan = planned(LAYERS, schedule)
    assert kinds(pipe) == FUSED[schedule]
    with unfused():
        apart, before = planned(LAYERS, schedule)
    assert kinds(apart) == {}
    # A launch less for each, and what it handed over is moved by nobody.
    saved = sum(FUSED[schedule].values())
    assert before.launches - plan.launches == saved
    assert plan.launches == sum(
        isinstance(item, Run | Move | Copy) for item in plan_of(pipe).instructions
    )
    assert plan.as_dict()["launches"] == plan.launches
    # Two programs become one where all microbatches are fused. (Under `v_min` devices
    # have stages that share their programs.)
    if schedule != "v_min":
        assert before.programs - plan.programs == len(FUSED[schedule])
    else:
        x, params = jnp.ones((2 * M, 4)), pipe.place([jnp.eye(4) for _ in LAYERS])
        compiled = pipe.compile(params, x, loss_fn=jnp.mean, argnums=(0, 1))
        assert plan.programs == compiled


def test_one_device_runs_a_microbatch_of_all_its_stages_as_few_programs():
    """Under `zb_h1` on one device a step is one program for each microbatch."""
    pipe, plan = planned(LAYERS[:1], "zb_h1")
    assert kinds(pipe) == {"F0 I0 W0": 4}
    # Those, the zeros, what joins the loss, and the gradient of `x`.
    assert plan.launches == 4 + 3


def test_nobody_waits_for_what_is_fused():
    """What leaves a device is made by the last action of its program, and what comes is
    there before the first one.
    """
    layers = models()["jump2"]
    case = Case(layers, M)
    for schedule in ("1f1b", "zb_h1", "zb_v", "v_min"):
        several = fpipe.schedules.NAMES[schedule].per_device != 1
        devices = jax.devices()[: 2 if several else 4]
        pipe = fpipe.Pipe(layers, [1, 1, 1, 1], devices, M, schedule=schedule)
        pipe.plan(case.params(), case.x, case.target, loss_fn=mse, argnums=(0, 1))
        plan = plan_of(pipe)
        first_of: dict[int, tuple] = {}
        last_of: dict[int, tuple] = {}
        for item in plan.instructions:
            if isinstance(item, Run) and item.parts:
                for part in item.parts:
                    last_of |= dict.fromkeys(part.outs, part.action)
                first_of |= dict.fromkeys(item.outs, item.actions[-1])
        sent = {n for i in plan.instructions if isinstance(i, Move) for n in i.ins}
        made = sent & last_of.keys()
        # Sums go to their owner, and losses to whom they are told, when all is done.
        early = [
            plan.slots[n].name
            for n in made
            if last_of[n] != first_of[n] and plan.slots[n].role != "gradients"
        ]
        assert early == [], schedule


def test_a_recomputation_that_waits_for_nothing_stays_apart():
    pipe, _ = planned(LAYERS, "1f1b", checkpoint="always", recompute="early")
    assert kinds(pipe) == {"F3 B3": 4}
    actions = [
        a
        for item in plan_of(pipe).instructions
        if isinstance(item, Run)
        for a in item.actions
    ]
    assert any(a.kind == "R" for a in actions)


def test_what_is_copied_to_the_host_is_not_fused():
    """An `O` stands between a forward and its backward."""
    rows = [
        [(k, 0, i) for i in range(2) for k in "FB"],
        [(k, 1, i) for i in range(2) for k in "FOLB"],
    ]
    schedule = fpipe.schedules.Schedule(rows)
    pipe = fpipe.Pipe(LAYERS[:2], chunks=2, schedule=schedule)
    params = (jnp.eye(4), jnp.eye(4))
    pipe.plan(params, jnp.ones((4, 4)), loss_fn=jnp.mean)
    assert kinds(pipe) == {}


def test_a_program_for_few_microbatches_is_not_compiled():
    """A fused program pays where half of the microbatches run it."""
    together = [[("F", 0, 0), ("B", 0, 0)]]
    apart = [[("F", 0, i) for i in (1, 2)], [("B", 0, i) for i in (1, 2)]]
    one_of_three = [list(itertools.chain(*together, *apart))]
    pipe = fpipe.Pipe(
        LAYERS[:1], chunks=3, schedule=fpipe.schedules.Schedule(one_of_three)
    )
    pipe.plan((jnp.eye(4),), jnp.ones((6, 4)), loss_fn=jnp.mean)
    assert kinds(pipe) == {}
    two_of_three = [[*one_of_three[0][:2], ("F", 0, 1), ("B", 0, 1)]]
    two_of_three[0] += [("F", 0, 2), ("B", 0, 2)]
    pipe = fpipe.Pipe(
        LAYERS[:1], chunks=3, schedule=fpipe.schedules.Schedule(two_of_three)
    )
    pipe.plan((jnp.eye(4),), jnp.ones((6, 4)), loss_fn=jnp.mean)
    assert kinds(pipe) == {"F0 B0": 3}


def test_microbatches_share_the_fused_program_whatever_their_numbers():
    """A number of a microbatch may be that of a layer, by chance."""
    layers = models()["dropout"]
    case = Case(layers, chunks=5, rows=10)
    pipe = fpipe.Pipe(layers, [2, 2], chunks=5, schedule="1f1b", checkpoint="never")
    needs = {"key": jax.random.key(1), "train": True}
    pipe.plan(case.params(), case.x, case.target, loss_fn=mse, **needs)
    calls = {
        id(item.call)
        for item in plan_of(pipe).instructions
        if isinstance(item, Run) and len(item.parts) > 1
    }
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("model", "schedule", "balance"),
    [("tied", "v_min", [1, 1, 1, 1]), ("stateful", "zb_h1", [1, 3])],
)
def test_fused_steps_compute_what_the_plain_composition_computes(
    model, schedule, balance
):
    """Beside the table of all options, which are fused where they can be."""
    layers = models()[model]
    several = fpipe.schedules.NAMES[schedule].per_device != 1
    devices = jax.devices()[: len(balance) // (2 if several else 1)]
    pipe = fpipe.Pipe(layers, balance, devices, 3, "never", schedule)
    check(Case(layers, 3), pipe, "inside")
    assert any(
        isinstance(item, Run) and len(item.parts) > 1
        for item in plan_of(pipe).instructions
    )


def test_on_a_mesh_too():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    layers = [dense()] * 2
    case = Case(layers, 3, rows=12)
    pipe = fpipe.Pipe(
        layers,
        chunks=3,
        schedule="1f1b",
        mesh=Mesh(devices, ("stage", "data")),
        data_axes=("data",),
    )
    step = pipe.value_and_grad(mse, argnums=(0, 1))
    params = case.params()
    got = step(pipe.place(params), case.x, case.target)
    want = case.reference.value_and_grad(mse, argnums=(0, 1))
    assert_same(got, want(params, case.x, case.target))
    assert kinds(pipe) == {"F1 B1": 3}


@pytest.mark.parametrize("over_a_mesh", [False, True])
def test_what_one_brings_another_reads(over_a_mesh):
    """On the second device two stages are fused in a forward. The first passes its
    input on as a skip, so it brings it for the second, and reads it too.
    """
    layers, devices = models()["jump1"], jax.devices()
    places: dict[str, Any] = {"balance": [1, 1, 1, 1], "devices": devices[:2]}
    if over_a_mesh:
        mesh = Mesh(np.reshape(devices[:4], (2, 2)), ("stage", "data"))
        places = {"mesh": mesh}
    pipe = fpipe.Pipe(layers, chunks=2, schedule="v_half", **places)
    for loss in ("inside", "outside"):
        check(Case(layers, 2, rows=8), pipe, loss)
    assert kinds(pipe)["F1 F2"] == 2


def test_numbers_are_those_of_programs_of_their_own():
    """Bit for bit here; XLA promises it for no model."""
    case = Case([dense()] * 2, 3)
    results = []
    for apart in (False, True):
        pipe = fpipe.Pipe(case.layers, chunks=3, schedule="1f1b")
        params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
        if apart:
            with unfused():
                results.append(step(params, case.x, case.target))
        else:
            results.append(step(params, case.x, case.target))
        assert bool(kinds(pipe)) == (not apart)
    jax.tree.map(np.testing.assert_array_equal, *results)
