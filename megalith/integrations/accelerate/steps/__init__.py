"""Train steps of a script's own, and models of its own."""
