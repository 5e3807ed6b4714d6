"""Figures of one trained model and its teacher, one kind a file.

Each file has `measure`, which returns a table of numbers, and `draw`, which returns its matplotlib figure. The room
never imports training or commands.
"""
