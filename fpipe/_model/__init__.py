"""The model: layers, their needs and skips, microbatches, and the stages they are cut
into.
"""
