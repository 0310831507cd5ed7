"""What every other folder uses: errors, files, locks, units, registries, environment variables. No torch."""
