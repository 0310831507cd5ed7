"""Megatron's flags that set nothing here, and numbers as Megatron counts them."""
