"""Drawings of timelines: `text.py` for terminals and `svg.py` for browsers.

Both draw a `Picture`, the plain data that `picture.py` makes of a schedule or timeline,
and so does `fpipe.plot`.
"""
