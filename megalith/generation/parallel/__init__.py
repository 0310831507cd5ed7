"""Generation over several processes: split models, replicas behind one queue, one process that drives the others."""
