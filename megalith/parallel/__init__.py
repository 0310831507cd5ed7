"""How any nn.Module is spread over a mesh of processes; module names, no model classes."""
