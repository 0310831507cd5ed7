"""Every knob, in frozen sections; YAML, flags and the checks over them. No torch."""
