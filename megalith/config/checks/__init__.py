"""The rules of a config, before torch is imported."""
