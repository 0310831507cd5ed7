"""What a session writes and reads: states, and Hugging Face folders."""
