"""A stage's programs: traced once, differentiated, and cut into forward and backward."""
