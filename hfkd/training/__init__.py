"""The trainer and its parts: callbacks, checkpoints, exports, pushes, backends, evaluation, the log of terms.

Every override of transformers' Trainer stands in `trainer.py`, and every name of another library that hfkd leans on in
`upstream.py`, which is checked here, before anything else is imported. This room never imports commands, search,
comparison or figures.
"""

from .upstream import check_upstream

check_upstream()
