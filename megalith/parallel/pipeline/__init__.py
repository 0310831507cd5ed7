"""Pipeline parallelism: how a model is cut into stages, and how these are run."""
