"""Faster imports of the libraries that a run needs."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let Python's garbage collector rest while modules are imported, and never visit them again.

    torch and transformers make a million objects that live as long as the process. The collector would visit them again
    and again while they are made, which is a fifth of the time of these imports, and later in every full collection.
    """
    if not gc.isenabled():  # within another such block, or switched off by the program
        yield
        return
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else only objects of a program that may yet become garbage would be frozen
            gc.freeze()
            atexit.register(gc.unfreeze)  # else what is left at the end is reported as leaked, by nanobind for triton
        gc.enable()
