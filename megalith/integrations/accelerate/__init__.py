"""Accelerate's Megatron-LM plugin, on megalith's engine. Scripts import these names from `megalith.accelerate`."""
