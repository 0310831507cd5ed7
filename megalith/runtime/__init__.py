"""From a config to a model on its devices: where model, plan and weights come together."""
