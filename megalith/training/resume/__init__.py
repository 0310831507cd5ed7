"""How a run is saved, and what it starts from."""
