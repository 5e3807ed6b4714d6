"""Recipes: the argument classes, the table of keys, the reading of recipe files and the command-line parser.

A recipe becomes `ModelArguments`, `DataArguments` and `DistillationConfig`. Their values are checked before
anything large is loaded.
The room imports only errors, names, losses and data; it never imports networks or training.
"""
