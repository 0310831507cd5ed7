"""Starts processes on this machine, and reads and asks for the configuration of Hugging Face Accelerate. No torch."""
