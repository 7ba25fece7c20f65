"""The search for a schedule, for given costs and a memory limit.

`zero_bubble.py` is the search itself. It tries the schedules that have a name and what
`list_scheduler.py` makes under many policies, and improves the best of them with
`improve.py`. `problem.py` has the tables that all of these work on.
"""
