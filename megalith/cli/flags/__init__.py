"""Flags that several verbs have in common."""
