"""What is imported before the first step, and how."""

import gc
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from hfkd import load_student
from hfkd.commands.importing import importing

# Each takes a tenth of a second to a second, and no training needs it before its first step.
UNWANTED = ("evaluate", "matplotlib", "numba", "onnx", "optuna", "scipy.stats", "sklearn", "tensorboard")
FIRST_STEP = f"""
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

def end(*_):
    print([name for name in {UNWANTED} if name in sys.modules], flush=True)
    os._exit(0)

register_optimizer_step_post_hook(end)
from hfkd.cli import main
main(sys.argv[1:])
"""


def test_modules_that_a_first_step_does_not_need_are_not_imported():
    for split in ("train", "test"):
        for label in ("a", "b"):
            for number in range(4):
                folder = f"photos/{split}/{label}"
                Path(folder).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (number, 0, 0)).save(f"{folder}/{number}.png")
    load_student("cifar_resnet8", ["a", "b"]).save_pretrained("teacher")
    words = ["distill", "--dataset_name", "photos", "--student", "cifar_resnet8", "--teacher", "teacher"]
    ran = subprocess.run([sys.executable, "-c", FIRST_STEP, *words], capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines()[-1:] == ["[]"], ran.stdout + ran.stderr


@pytest.fixture
def frozen_before():
    yield gc.get_freeze_count()
    gc.unfreeze()


def test_the_collector_rests_while_modules_are_imported(frozen_before, monkeypatch):
    at_end = []
    monkeypatch.setattr("atexit.register", at_end.append)
    with importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen_before
    with pytest.raises(ValueError), importing():
        monkeypatch.setitem(sys.modules, "another", types.ModuleType("another"))
        raise ValueError
    assert gc.isenabled() and gc.get_freeze_count() > frozen_before
    assert at_end == [gc.unfreeze]
