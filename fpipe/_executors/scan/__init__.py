"""The scan executor: the whole call as one XLA program over a mesh."""
