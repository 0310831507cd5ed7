"""The layers of a transformer, on ordinary tensors; they are written for one device and one process."""
