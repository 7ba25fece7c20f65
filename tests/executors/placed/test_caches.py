"""What a call that decodes does with caches: it hands them from program to program."""

import operator

import jax

from fpipe._executors.placed.instructions import Move, Run
from fpipe._executors.placement import Placement
from tests.executors.helpers import placed_executor
from tests.model.test_decoding import PROMPT, decoder


def test_caches_are_not_cut_joined_moved_or_copied(monkeypatch):
    pipe, params, x, state = decoder()
    x, state = pipe(params, x, state=state, step=0, donate_state=True)
    x, state = pipe(params, x, state=state, step=PROMPT, donate_state=True)
    taken = []
    take = Placement.take
    monkeypatch.setattr(
        Placement, "take", lambda self, a, _: [taken.append(len(a)), take(self, a)][1]
    )
    where = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
    x, state = pipe(params, x, state=state, step=PROMPT + 1, donate_state=True)
    # Each cache stays at its place in memory, on the device of its stage.
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)] == where
    for k, device in zip((1, 2), pipe.devices, strict=True):
        assert {a.device for a in jax.tree.leaves(state[k])} == {device}
    # The two pieces of `x`, which come from the last stage; and the step, for each.
    assert sum(taken) == 2 + 2
    # No program but those of the stages, and no state among what goes over.
    for bound in placed_executor(pipe)._plans.values():
        plan = bound.plan
        # The next call finds the very objects, and compares none by its value.
        own = [a.sharding for a in jax.tree.leaves(params)]
        assert all(map(operator.is_, bound.shardings, own))
        for item in plan.instructions:
            if isinstance(item, Run):
                assert item.parts
            if isinstance(item, Move):
                assert not any("state" in plan.slots[n].name for n in item.ins)
