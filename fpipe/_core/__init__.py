"""What every room uses and what imports no other room: pytrees as flat arrays, notes on
errors, caches, a token of the settings of JAX, and a look at forks.
"""
