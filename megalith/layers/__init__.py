"""The bricks of a transformer, on plain tensors; they know of one device and one process."""
