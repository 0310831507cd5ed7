"""Tokens to samples, in Megatron's order: datasets, their indices, blends and splits."""
