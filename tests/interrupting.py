"""Processes that are ended in the middle of something, and what a run comes to in the end."""

import contextlib
import functools
import itertools
import json
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import Plain, config, images
from transformers import TrainerCallback

import hfkd.data.datasets
from hfkd import DistillationTrainer, load_student

TIMES = {"seconds", "images_per_second"}
EVENTS = ("step_begin", "step_end", "prediction_step", "evaluate", "save", "epoch_begin", "epoch_end")


RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "losses": {"ctkd": {}},
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:160]",
    "eval_split": "test[:10]",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 6,
    "save_total_limit": 2,
    "ema_decay": 0.7,
    "disable_tqdm": True,
    "report_to": "none",
}


def write_recipe(monkeypatch, **changes) -> None:
    """recipe.yaml and its teacher, which take this process no more time than they must."""
    digits = hfkd.data.datasets._digits()
    monkeypatch.setattr(hfkd.data.datasets, "_digits", lambda: digits)
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
    torch.manual_seed(1)
    load_student("cifar_resnet8", num_classes=10).save_pretrained("teacher")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))


class Moments(TrainerCallback):
    """Counts the moments of a training, and does something at one of them."""

    def __init__(self, at=None, act=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        self.at, self.act = at, act
        self.passed = []
        for event in EVENTS:
            setattr(self, f"on_{event}", lambda args, state, control, event=event, **kwargs: self.passes(event, state))

    def passes(self, name, state):
        self.passed.append((name, state.global_step))
        if len(self.passed) - 1 == self.at:
            self.act()


class MomentsWhileSaving(DistillationTrainer):
    moments: Moments

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.moments.passes("writing", self.state)


def build(output_dir, moments=None, **changes):
    torch.manual_seed(0)
    settings = {
        "losses": {"ctkd": {}},
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "lr_scheduler_type": "cosine",
    }
    args = config(output_dir, **(settings | changes))
    data = {"train_dataset": images(24), "eval_dataset": images(10, seed=1, augment=False)}
    moments = moments or Moments()
    trainer = MomentsWhileSaving(Plain(), Plain(), args, callbacks=[moments], **data)
    trainer.moments, trainer.settings = moments, changes
    return trainer


def start(function) -> int:
    """Runs a function in a process of its own, forked from this one, which has imported everything; returns its id."""
    process = os.fork()
    if process == 0:
        code = 1
        AcceleratorState._reset_state(reset_partial_state=True)  # of one process, which this one was
        try:
            function()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # of a terminal that is closed
                    stream.flush()
            os._exit(code)
    return process


def end(process: int) -> int:
    """Waits for a process; returns its exit code, which is -9 if signal 9 ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def in_child(function) -> int:
    return end(start(function))


def in_two_processes(function) -> list[int]:
    return in_processes(2, function)


def in_processes(count, function) -> list[int]:
    return [end(process) for process in start_processes(count, function)]


def start_processes(count, function) -> list[int]:
    """Runs a function of the rank in processes that know each other, as a launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def ranked(rank):
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in here.items()})
        signal.alarm(300)  # if they wait for each other
        function(rank)

    return [start(functools.partial(ranked, rank)) for rank in range(count)]


def kill_at_write(number: int) -> None:
    """Has this process killed by signal 9 just before it opens, renames or removes a file for the given time."""
    left = itertools.count(number, -1)

    def hook(event, arguments):
        opens = event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (opens or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def differences(expected, given) -> list[str]:
    """Where two states differ, to the last bit."""
    expected, given = dict(_flat(expected)), dict(_flat(given))
    odd = [f"{key}: only in one" for key in expected.keys() ^ given.keys()]
    return odd + [key for key in expected.keys() & given.keys() if not _equal(expected[key], given[key])]


def end_of(trainer) -> dict:
    """All that a training came to, but for how long it took."""
    state = trainer.state
    return {
        "student and losses": trainer.distiller.state_dict(),
        "average": trainer.average.module.state_dict() if trainer.average else None,
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "rows": [_timeless(row) for row in trainer.results.rows],
        "log": [_timeless(entry) for entry in state.log_history if "train_runtime" not in entry],
        "best": (state.best_metric, state.best_global_step),
        "step": (state.global_step, state.epoch),
        "random": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
    }


def left_in(folder, role="student") -> dict:
    """All that a finished run leaves: its last checkpoint, its export, its results, but for how long it took."""
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text())
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    marks = ("checkpoint.json", "checkpoint.begun")  # the second stays if the process is killed just before its end
    left = {f"{last.name}/{path.name}": _content(path) for path in last.iterdir() if path.name not in marks}
    left[role] = _content(folder / role / "model.safetensors")
    left["rows"] = [_timeless(row) for row in results["epochs"]]
    left["best"], left["last"] = results["best"], results["last"]
    return left


def _content(path: Path):
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)  # written by this test
    content = json.loads(path.read_text())
    if path.name == "trainer_state.json":
        content["log_history"] = [_timeless(entry) for entry in content["log_history"]]
        content["best_model_checkpoint"] = Path(content["best_model_checkpoint"] or "").name
    return content


def _timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMES and not key.endswith(("runtime", "_second"))}


def _flat(value, path=""):
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        yield path, value
        return
    yield path, None
    for key, entry in value:
        yield from _flat(entry, f"{path}/{key}")


def _equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other)
