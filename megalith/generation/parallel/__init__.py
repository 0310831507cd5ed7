"""Generation over several processes: split models, replicas behind one queue, and one process that drives the others."""
