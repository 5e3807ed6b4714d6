"""Figures of a run: each file measures and draws one. What it measures is a table, of which it draws all."""
