"""What Retro's training reads, made in three steps: a database of chunks, an index of them, neighbours of samples."""
