"""Recipes: the three argument classes, what each key is, reading YAML over its parent, and the command-line parser.

A recipe becomes `ModelArguments`, `DataArguments` and `DistillationConfig`, checked before anything large is loaded.
The room imports only errors, names, losses and data; it never imports networks or training.
"""
