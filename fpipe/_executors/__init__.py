"""What the executors share.

    call            what a user calls, and the arguments as `Args`
    protocol        `Executor`: what a pipe knows of the thing that runs its calls
    scheduling      which schedule, before the number of microbatches is known
    request         a call as data: shapes, and which gradients it wants
    routes          who makes and who reads every value
    programs        each stage traced, differentiated, and split into programs
    placement       where a stage lives
    stage_places    where stages may live, from the arguments of a pipe
    pull_back       calls that `jax.grad` and `jax.vjp` differentiate from outside
    gradients       loss scales, and gradients that are added to earlier ones
    recording       `fpipe.record`
    plan_data       what a prediction is told of a call
    anomaly, faults which layer made the first NaN
    tracers         which calls under a transformation are refused
    sequential      the reference that every executor must agree with

A call goes down this list: `call` makes `Args` of it, an executor finds or makes a plan
for the `request`, out of `programs` that read and make what the `routes` say.
"""
