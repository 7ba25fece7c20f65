"""A stage is traced once, differentiated, and split into programs.

In: a stage's layers and the shapes of one microbatch. Out: the programs of its actions,
each a list of equations with names for what goes in and out.

    trace           the stage as a function of flat arrays, then with its backward
    graph           the two as one list of equations; the only file that reads jaxprs
    remats          the recomputations in it inlined, where the backward is cut in two
    residuals       which equations are the backward's, and what the forward keeps
    min_cut         the fewest bytes to keep
    halves          a backward as `I` and `W`
    stage_programs  what each program takes and returns, by name
    code            a program; what it computes, as a function that can be compiled
    identity        codes of different stages that compute the same
    control_flow    what goes on inside of loops and branches
    retracing       loops, branches and calls with other equations in them
    row_sums        weight gradients as sums over each device's rows
    products        weight gradients without a transpose
    whole_axes      equations that move numbers along an axis which devices share

A stage is cut as a graph, not by `jax.vjp` in one program and its pull-back in another:
the residuals of a pull-back hold the weights and casts of them, and programs copy what
they return, so that each microbatch in flight would have a copy of the weights.
"""
