"""Record the exact results of short runs and compare them later, for changes that must not change results.

    python scripts/fingerprint.py record FILE
    python scripts/fingerprint.py compare FILE [--only NAME ...]

The script trains a teacher and the eight students of RUNS, and resumes each from a checkpoint in the middle of an
epoch. It uses the command line alone, so modules may move. Record and compare on the same machine: other processors
and library versions round differently.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # import hfkd from this checkout, even if another one is installed

TEACHER = "teacher"
BASE = {
    "dataset_name": "digits",
    "image_size": 16,
    "random_flip": False,
    "train_split": "train[:400]",
    "eval_split": "test[:100]",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 64,  # seven steps an epoch, the last of sixteen images
    "per_device_eval_batch_size": 64,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.03,
    "lr_scheduler_type": "cosine",
    "weight_decay": 5.0e-4,
    "decay_all_parameters": True,
    "eval_strategy": "epoch",
    "logging_strategy": "steps",
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 10,  # in the second epoch, and not at its end
    "disable_tqdm": True,
}
STUDENT = BASE | {"student_name_or_path": "cifar_resnet8", "teacher_name_or_path": f"runs/{TEACHER}/{TEACHER}"}
VIT = {
    "student_name_or_path": "deit_tiny_distilled_patch16_224",
    "image_size": 32,
    "patch_size": 4,
    "train_split": "train[:160]",
    "per_device_train_batch_size": 32,
    "dataloader_drop_last": True,
    "mixup": 0.8,
    "cutmix": 1.0,
    "optim": "adamw_torch",
    "optim_args": None,
    "learning_rate": 5.0e-4,
    "warmup_steps": 0.1,
    "decay_all_parameters": False,
    "save_steps": 7,
}
STREAM = {
    "dataset_name": "photos",
    "streaming": True,
    "shuffle_buffer_size": 50,
    "augmentation": "random_resized_crop",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "crop_pct": 0.875,
    "train_split": "train",
    "eval_split": "test",
    "dataloader_num_workers": 1,
    "ema_decay": 0.8,
    "save_steps": 7,
}
BEST = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
# Several runs also have a setting that does not belong to their method, to cover it once.
RUNS = {
    "kd": {"losses": {"kd": {"temperature": 4.0, "weight": 0.9}}, "ce_weight": 0.1, "ema_decay": 0.8},
    "dkd_zscore": {
        "losses": {"dkd": {"temperature": 2.0, "weight": 9.0, "warmup_epochs": 2}},
        "logit_standardization": True,
        "lr_milestones": [2],
    },
    "ctkd": {
        "losses": {"ctkd": {"weight": 0.9, "curriculum_epochs": 2}},
        "gradient_accumulation_steps": 2,  # four updates an epoch
        "save_steps": 6,
    },
    "mlkd": {"losses": {"mlkd": {}}, "bf16": True},
    "crd": {"losses": {"kd": {}, "crd": {"weight": 0.8, "negatives": 64, "dimension": 32}}},
    "simkd": {"losses": {"simkd": {"factor": 2}}, "ce_weight": 0.0, **BEST},
    "deit": {"losses": {"kd": {"temperature": 3.0, "weight": 10.0}}, "logit_standardization": True, **VIT},
    "stream": {"losses": {"kd": {}}, **STREAM},
}

NO_RESULT = {"seconds", "versions", "git_commit"}
NO_RESULT_ENDS = ("runtime", "_per_second")
CARD_LINES_OF_TIME = re.compile(
    r"\| (time, with evaluations|training images/s|versions|commit of hfkd) |Install hfkd first, "
)


# ---- Running -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """Work in a temporary folder, with an environment in which two runs do the same arithmetic."""
    former = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(former)


def import_all() -> None:
    """Import the libraries of every run once, for the processes that are forked from this one."""
    import sklearn.datasets  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import torch

    import hfkd.commands.train  # noqa: F401
    from hfkd import DistillationTrainer  # noqa: F401

    torch.set_num_threads(1)


def in_child(function: Callable, *arguments: Any) -> None:
    """Call a function in its own process, so that no run sees the memory of another.

    Raises:
        SystemExit: if it fails, after its output is printed.
    """
    child = multiprocessing.get_context("fork").Process(target=_quietly, args=(function, *arguments))
    child.start()
    child.join()
    if child.exitcode:
        print(Path("log.txt").read_text(), file=sys.stderr)
        raise SystemExit(f"{function.__name__}{arguments} ended with exit code {child.exitcode}.")


def _quietly(function: Callable, *arguments: Any) -> None:
    with open("log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    function(*arguments)


def call_hfkd(*words: str) -> None:
    """Run `hfkd` with these arguments."""
    from hfkd.cli import main

    main(list(words))


def write_photos() -> None:
    """Write a folder of Parquet files with digits under noise: two files of 150 images to train on, one to test on."""
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, random = load_digits(), np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    Path("photos").mkdir()
    for name, first, last in zip(names, (0, 150, 300), (150, 300, 400), strict=True):
        rows = []
        for pixels, label in zip(digits.images[first:last], digits.target[first:last], strict=True):
            large = np.kron(pixels, np.ones((5, 4)))[..., None] * 12 + random.integers(0, 60, (40, 32, 3))
            file = io.BytesIO()
            Image.fromarray(large.astype(np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": int(label)})
        datasets.Dataset.from_list(rows, features=features).to_parquet(f"photos/{name}.parquet")


def copy_up_to(run: str, step: int, target: str) -> None:
    """Copy the folder of a run, with its checkpoints up to `step`."""
    Path(target).mkdir()
    for path in Path(run).iterdir():
        if path.name in ("recipe.yaml", "results.json"):
            shutil.copy(path, target)
        elif path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) <= step:
            shutil.copytree(path, Path(target, path.name))


def run_and_resume(name: str) -> dict[str, Any]:
    """Train one student, resume it from its first checkpoint, and return the fingerprints of both runs by name."""
    settings, resumed = STUDENT | RUNS[name], f"{name}_resumed"
    write_recipe(name, settings)
    in_child(call_hfkd, "distill", f"{name}.yaml")
    copy_up_to(f"runs/{name}", settings["save_steps"], f"runs/{resumed}")
    words = ("--output_dir", f"runs/{resumed}", "--resume_from_checkpoint", "true")
    in_child(call_hfkd, "distill", f"{name}.yaml", *words)
    return {run: fingerprint(Path("runs", run), "student") for run in (name, resumed)}


def write_recipe(name: str, settings: dict[str, Any]) -> None:
    """Write a recipe into the current folder as JSON, which is valid YAML."""
    Path(f"{name}.yaml").write_text(json.dumps(settings))


def run_all(names: list[str]) -> dict[str, Any]:
    """Train the teacher and the students of these names; return their fingerprints."""
    with workplace():
        import_all()
        write_recipe(TEACHER, BASE | {"student_name_or_path": "cifar_resnet20"})
        in_child(call_hfkd, "train-teacher", f"{TEACHER}.yaml")
        found = {TEACHER: fingerprint(Path("runs", TEACHER), TEACHER)}
        in_child(write_photos)
        for name in names:
            print(f"{name} ...", file=sys.stderr)
            found |= run_and_resume(name)
        return found


# ---- Fingerprints --------------------------------------------------------------------------------------------------


def fingerprint(run: Path, role: str) -> dict[str, Any]:
    """Return the results of a run, without times, versions and the commit."""
    import yaml

    card = Path(run, role, "README.md").read_text().splitlines(keepends=True)
    lines = [line for line in card if not CARD_LINES_OF_TIME.match(line)]
    return {
        "recipe": yaml.safe_load(Path(run, "recipe.yaml").read_text()),
        "results": timeless(json.loads(Path(run, "results.json").read_text())),
        "log": timeless(json.loads(Path(run, "trainer_state.json").read_text())["log_history"]),
        "card": sha256("".join(lines).encode()),
        "files": {str(path.relative_to(run)): content_of(path) for path in sorted(run.rglob("*")) if path.is_file()},
    }


def content_of(path: Path) -> str | None:
    """Return the hash of weights and config.json, and None for other files, which may hold times."""
    return sha256(path.read_bytes()) if path.suffix == ".safetensors" or path.name == "config.json" else None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def timeless(value: Any) -> Any:
    """Return a value without the entries of NO_RESULT and NO_RESULT_ENDS, at any depth."""
    if isinstance(value, list):
        return [timeless(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {key: entry for key, entry in value.items() if key not in NO_RESULT and not key.endswith(NO_RESULT_ENDS)}
    return {key: timeless(entry) for key, entry in kept.items()}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value with its path, as JSON, in which NaN equals NaN and 1 differs from 1.0."""
    if isinstance(value, (dict, list)) and value:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(entry, f"{path}/{key}" if path else str(key))
    else:
        yield path, json.dumps(value)


def differences(run: str, recorded: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Return a line for every value that differs between two fingerprints of a run."""
    one, other = dict(flat(recorded)), dict(flat(given))
    return [
        f"{run} {path}: {one.get(path, 'nothing')} recorded, {other.get(path, 'nothing')} now"
        for path in dict.fromkeys([*one, *other])
        if one.get(path) != other.get(path)
    ]


# ---- Command line --------------------------------------------------------------------------------------------------


def compare(recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """Print all differences between two sets of runs.

    Raises:
        SystemExit: with 1 if there is a difference.
    """
    found = [line for run in given for line in differences(run, recorded.get(run, {}), given[run])]
    if found:
        print("\n".join(found))
        raise SystemExit(1)
    print(f"All {len(given)} runs are equal to the byte.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="names of runs")
    args = parser.parse_args()
    recorded = json.loads(args.file.read_text()) if args.action == "compare" else None
    given = run_all(args.only)
    if recorded is None:
        args.file.write_text(json.dumps(given, indent=1) + "\n")
    else:
        compare(recorded, given)


if __name__ == "__main__":
    main()
