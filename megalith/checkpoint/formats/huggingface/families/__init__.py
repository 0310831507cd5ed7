"""Hugging Face's architectures, a table each: fields of config.json and names of weights, used in both directions."""
