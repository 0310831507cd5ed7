"""The loop: batches in, better weights out, and what happens every so often."""
