"""Every option of a run, in frozen sections; YAML, flags and the checks over them. No torch."""
