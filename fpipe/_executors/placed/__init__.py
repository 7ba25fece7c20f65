"""The placed executor: one compiled program per (stage, kind), dispatched
asynchronously.

The way of a call through the modules:

    executor        finds the plan of the call, or has it made
    work, epilogue  schedule -> programs that read and make values anywhere
    lower           programs -> plan: moves added, slots numbered, slots freed
    instructions    the plan as data
    compile         every program of the plan, before it runs
    dispatch        puts the inputs in the slots and issues the plan
    threads         one dispatching thread, or one for each device

Three modules read a plan without running it: `memory` (what is alive), `plan_data`
(what a prediction needs) and `watch` (when everything ran, for `fpipe.record`).
"""
