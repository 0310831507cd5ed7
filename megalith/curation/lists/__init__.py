"""Lists that --domains and --extensions replace."""
