"""How gradients change weights: groups, optimizers, schedules, clipping, loss scale. Independent of any model."""
