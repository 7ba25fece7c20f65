"""A stage is traced once, differentiated, and split into programs."""
