"""What a pipe will cost: costs of layers, balance, prediction and advice.

Two questions are answered here, from shapes and, unless time is to be measured, without
running anything. Before a model is cut: how many layers go into each stage?

    layer_traces    each layer traced as a stage of its own; equal layers once
    work            FLOPs, bytes or seconds of a program
    layer_costs     the two together, as `costs.LayerCosts`
    span_tables     what each span of layers costs as a stage
    partition       the best cut through these tables
    balance         `fpipe.balance`: all of this together
    pipe_balance    the same for `Pipe(balance=...)`

And when it is cut: what will a step take?

    step_request    the step that is asked about
    hardware        what it runs on
    predict         from what an executor tells to a `prediction.Prediction`
    advice          what would be better
    text            numbers with units, and tables

Balance adds up costs of layers, because it looks at every span of them. Prediction asks
for the programs of the stages that there are. So the two may differ a little: what a
backward makes again is decided for a stage, not layer by layer.
"""
