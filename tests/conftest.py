"""Tests need no network and share two cores: one thread a process."""

import functools
import importlib.metadata
import os
import random
import signal
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start, which are compared with this one to the bit
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("HFKD_TEST_GPU", ""))

import accelerate.utils.memory  # noqa: E402
import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a shell starts in the background ignores it
# The suite builds some 3,000 trainers. Each collects garbage, for which Python looks through all that is imported: 0.3
# seconds before a training of 0.1 (Python still collects by itself). Each asks for the versions of nine packages, which
# reads and parses files, and sets seeds, for each of which torch keeps the whole stack if there is no GPU.
accelerate.utils.memory.gc = types.SimpleNamespace(collect=lambda: None)
importlib.metadata.version = functools.cache(importlib.metadata.version)
if not torch.cuda.is_available():
    torch.cuda.manual_seed_all = lambda seed: None
    # torch.export announces a CUDA device that is not there. A first backward after it would start autograd's threads
    # for it, and no process forked later could train; after this one none are started.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory):
    """Fixtures of whole modules, and processes that tests start, find an empty cache of datasets."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def same_draws():
    """Whatever ran before, a test draws the same numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write to the working directory, and beside the cache of datasets: each test has its own of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
