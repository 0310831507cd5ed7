"""How any nn.Module is parallelized over a device mesh, by module names and without knowledge of model classes."""
