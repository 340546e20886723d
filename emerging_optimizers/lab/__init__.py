"""LAYER 5 · experiments on the optimizers: the training job, its learning-rate grid, figures and the CLI.

The one arrow: the lab depends on everything below it, and nothing depends on the lab. matplotlib is
imported in ``plots.py`` alone.
"""
