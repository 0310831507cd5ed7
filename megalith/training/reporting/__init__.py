"""What a run tells: lines, progress bar, metrics, pictures, profiles."""
