"""The placed executor: one compiled program per (stage, kind), dispatched
asynchronously.
"""
