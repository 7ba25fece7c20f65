"""The schedules that have a name: each a pure function from sizes to a `Schedule`.

`looped.py` has those whose stages go round the devices, `v_shaped.py` those whose
stages go down the devices and up again, and `sizes.py` what they share.

Each says from which paper it is, how long its devices are idle, and how many
microbatches they hold, and draws a small example; the tests assert all of it. `D`
devices, `v` stages on each, `m` microbatches; `F`, `B`, `I` and `W` are the times of
one microbatch on one device, all its stages together, and `B = I + W`. Idle time is the
makespan minus the work of a device, with equal stages and free transfers. Peak live
microbatches are (stage, microbatch) pairs on device `d`, as in `Timeline.peak_live`:
with `v > 1` each is `1/v` of what a device keeps for a whole microbatch.

The drawings have one column for an `F`, `I` or `W` of a stage and two for a `B`; `.` is
idle. Where a device has several stages, the stage stands before the letter, as in
`draw`. A drawing that is too wide goes on in a second block of rows.
"""
