"""Plans: how each model is split over the tensor-parallel axis, as tables."""
