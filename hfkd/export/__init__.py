"""Trained models as single files for other runtimes: ONNX and torch.export.

A file holds the network and the preprocessing of its images, and is compared with the model before it is left on disk.
The room never imports training or recipe.
"""
