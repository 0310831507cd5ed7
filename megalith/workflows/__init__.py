"""Jobs that need several rooms: conversions, the demo, the parity check, dry runs, the questions of `config`."""
