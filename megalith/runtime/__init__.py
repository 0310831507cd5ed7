"""Config in, a placed model out: where model, plan and weights meet."""
