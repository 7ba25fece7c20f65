"""The scan executor: the whole call as one XLA program over a mesh.

The way of a call through the modules:

    executor           finds the program of the call, or has it made
    units, values      stages, cut once more, and what goes between them
    ticks              the schedule in lock step
    buffers, storage   where arrays wait, and how they lie there
    operations, table  what runs, and which of it on which device at which tick
    lower, machine     all of this together, as data
    step               the machine as a function of flat arrays
    interpreter        the machine as a `jax.lax.scan` over its ticks

The interpreter has a module for each part of a tick: `reading`, `computing`, `moving`,
`summing`, `carry` and `feeds`. Parameters lie as `packing` says; `parameters` puts them
there. `memory` and `plan_data` read a machine without running it, and `clock` times it.
"""
