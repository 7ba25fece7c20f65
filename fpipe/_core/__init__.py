"""What every room uses and what imports no other room: pytrees as flat arrays, notes on
errors, caches, and the settings of JAX that a trace depends on.
"""
