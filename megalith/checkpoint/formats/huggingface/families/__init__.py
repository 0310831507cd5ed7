"""Hugging Face's architectures, a table each: their config's fields, their names of weights. Read in both directions."""
