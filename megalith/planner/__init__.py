"""FLOPs, activation memory and pipeline timelines from the config alone. No torch."""
