"""The model: layers, their needs and skips, microbatches, and the stages they are cut
into.

    layer, signatures     a layer, and what its function's signature says of it
    needs                 all that enters a layer or the loss, in one table
    skips, skip_routes    skips as a layer sees them, and where they go
    model                 layers in order, and the ends of skips and borrowed leaves
    layer_calls           one layer on one microbatch
    init                  parameters and states, made layer by layer
    stages                spans of layers as functions from ports to ports
    microbatch, wrappers  how a batch is cut
    joining               what the microbatches return, put together
    state                 what a microbatch gets of a layer's state
    batch_norm            running statistics of the whole batch
    loss                  the loss of one microbatch, checked
    remat                 which backwards recompute their forward
    frozen, specs         parameters that get no gradient, or are cut over a mesh
    function_layers       layers that are the pieces of one function
    straight              inputs that go straight to the layers that read them
    scopes                names by which an equation's layer is found again
"""
