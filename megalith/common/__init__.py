"""Words that every other folder shares: errors, files, units, names. No torch."""
