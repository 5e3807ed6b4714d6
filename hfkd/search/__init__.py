"""Hyper-parameter search: the searched space, the trials in an Optuna study, and their results as tables and a figure.

The room turns the `search` section of a recipe into trials of one trainer, and the best trial into a recipe. The
command line that starts a search is not part of it. It never imports commands.
"""
