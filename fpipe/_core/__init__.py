"""What every room uses, and what imports no other room.

pytrees     pytrees as flat tuples of arrays
statics     which leaves may be constants of a program
checks      arguments of public functions, checked
errors      notes on errors, and warnings
caches      what was used last is kept
settings    JAX's settings: a value for keys, and blocks in which they are others
makers      what makes parameters and states, with the mesh that it asks for
meshes      the mesh in the caller's context
processes   who has an array, if there are several processes
cpu_threads  XLA's threads for the work of CPU devices
heap        freed memory that is kept
watchdog    ends a process that waits too long for another one
leaks       values of a trace that outlive it
forks       forks of a process that has used JAX
"""
