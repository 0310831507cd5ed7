"""What a run reports: log lines, progress bar, metrics, pictures, profiles."""
