"""A traced function cut into layers. `split.py` has the public names, and the picture
of how the other modules follow each other.
"""
