"""Recipe, YAML and flags to one RunConfig."""
