"""How gradients change weights: groups, optimizers, schedules, clipping, loss scale. It is handed its tensors and knows no model."""
