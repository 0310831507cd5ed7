"""Tokenizers under Megatron's names, over the libraries that do the work."""
