"""Cleaning: rules that correct a text, take lines out of it, or drop its document."""
