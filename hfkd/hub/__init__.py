"""The Hub: a repository for an export, uploads, the model card with its curves, and errors that name the way out.

The room holds everything that talks to the Hub or writes what the Hub shows. It reads the files of a run and needs no
network or trainer. It never imports training or networks.
"""
