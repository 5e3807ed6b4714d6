"""Folders of runs: names of their files, whole writes, checkpoint manifests, finished runs, published values, tables.

The room holds all that reads or describes a run's folder without training or loading a network. It imports only errors,
losses and recipe. It never imports training or networks.
"""
