"""Text of a Retro: what it reads of neighbours while it writes."""
