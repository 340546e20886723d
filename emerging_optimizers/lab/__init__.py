"""LAYER 5 · experiments on the optimizers: the training job, its learning-rate grid, figures and the CLI.

The lab depends on everything below it, and nothing depends on the lab. Inside it imports go one way too, and
``make contracts`` holds both:

commands       ``__main__``, ``parsing`` (words of a line); ``present`` (files and terminal) and ``report`` (the page of
               all runs)
drawing        ``plots`` (matplotlib, imported nowhere else) and ``page`` (HTML)
views          each figure and each table of an experiment, described once as data
experiments    ``spike``, ``eigenbasis``, ``precision``, ``train``, ``grid``, ``tf32``, ``gallery``: a config, a run, a
               result
tasks          small models on small data, shared by the gallery and by benchmarks
shared         requests, places (what may become of what is there), run folders, measures, text, images and model
"""
