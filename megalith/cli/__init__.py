"""Argument strings to function calls, nothing else: one file for each verb."""
