"""Run folders, caches and searches with damaged files, and the commands that read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from .cases import Plan, Records, expected_of, strict_json
from .recipes import check_top1

RUN_FILES = (
    *("recipe.yaml", "results.json", "trainer_state.json", "student/config.json", "student/model.safetensors"),
    *("student/recipe.yaml", "student/results.json", "student/README.md", "student/training_curves.png"),
)
CHECKPOINT_FILES = (
    *("checkpoint.json", "rng_state.pth", "scheduler.pt", "optimizer.pt", "model.safetensors", "trainer_state.json"),
    *("config.json", "unlogged.json"),
)
COMMANDS = {
    "resume": ["distill", "run.yaml", "--resume_from_checkpoint", "true"],
    "start again": ["distill", "run.yaml"],
    "resume stopped": ["distill", "run.yaml", "--resume_from_checkpoint", "true"],
    "resume longer": [
        *("distill", "run.yaml", "--resume_from_checkpoint", "true", "--num_train_epochs", "3"),
        *("--allow_recipe_change", "true"),
    ],
    "evaluate": ["evaluate", "run/student"],
    "evaluate run": ["evaluate", "run"],
    "compare": ["compare", "run", "other", "--output_dir", "out"],
    "export": ["export", "run/student", "--format", "torch", "--output_dir", "out"],
    "visualize": ["visualize", "run/student", "--figures", "class_matrices", "--output_dir", "out"],
    "cached": ["distill", "cached.yaml", "--teacher_cache", "cache"],
    "search": ["search", "search.yaml", "--n_trials", "3", "--held_out", "0.25", "--search_dir", "search"],
    "teacher": ["distill", "cached.yaml", "--teacher_name_or_path", "run/student"],
}
OTHER_JSON = [
    *("null", "[]", "{}", '"text"', "42", "NaN", '{"epochs": null}', '{"epochs": [{}]}', '{"version": 99}', "[[[[[["),
    *('{"global_step": 1e400, "log_history": 7}', '{"best": {"top1": "high"}, "epochs": [1, 2]}'),
]


def _cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def _change_numbers(path: Path, value: float) -> None:
    """Replace every number of a JSON file by another one."""

    def changed(entry):
        if isinstance(entry, dict):
            return {key: changed(inner) for key, inner in entry.items()}
        if isinstance(entry, list):
            return [changed(inner) for inner in entry]
        return value if isinstance(entry, (int, float)) and not isinstance(entry, bool) else entry

    path.write_text(json.dumps(changed(json.loads(path.read_text()))))


def _lose_key(path: Path, position: int) -> None:
    content = json.loads(path.read_text())
    del content[list(content)[position % len(content)]]
    path.write_text(json.dumps(content))


def _change_type(path: Path, position: int) -> None:
    content = json.loads(path.read_text())
    key = list(content)[position % len(content)]
    content[key] = "text" if isinstance(content[key], (dict, list, int, float, type(None))) else {"a": [1]}
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable, list]] = {
    "cut": (_cut, [0.0, 0.3, 0.9, 0.99]),
    "removed": (lambda path, _: path.unlink(), [None]),
    "folder": (lambda path, _: _replace(path, Path.mkdir), [None]),
    "link": (lambda path, target: _replace(path, lambda new: new.symlink_to(target)), ["nowhere", "/dev/zero"]),
    "link to notes": (lambda path, _: _replace(path, lambda new: new.symlink_to(Path("notes.txt").resolve())), [None]),
    "pipe": (lambda path, _: _replace(path, os.mkfifo), [None]),
    "bytes": (
        lambda path, value: path.write_bytes(value.encode("latin-1")),
        ["\0" * 64, "\xff\xfe\x00a", "PK\x03\x04"],
    ),
    "long": (lambda path, _: path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 100), [None]),
}
JSON_DAMAGE = DAMAGE | {
    "JSON": (lambda path, text: path.write_text(text), OTHER_JSON),
    "deep": (lambda path, _: path.write_text('{"a": ' * 9000), [None]),
    "numbers": (_change_numbers, [0, -1, 1e300, 2**70, float("nan"), 0.5]),
    "key lost": (_lose_key, list(range(12))),
    "other type": (_change_type, list(range(12))),
}
YAML_DAMAGE = DAMAGE | {
    "text": (
        lambda path, text: path.write_text(text),
        ["", "null", "- a", "42", "nonsense_key: 1", "losses: 3", "dataset_name: [", "a: &a [*a]", "dataset_name: 3"],
    ),
}


def _damage_of(name: str) -> dict[str, tuple[Callable, list]]:
    return {".json": JSON_DAMAGE, ".yaml": YAML_DAMAGE}.get(Path(name).suffix, DAMAGE)


def cases() -> st.SearchStrategy[dict]:
    """Return the strategy of cases. A change is [path, damage, its value, expectation]."""

    def damaged(names):
        return st.sampled_from(names).flatmap(
            lambda name: st.sampled_from(
                [
                    [name, damage, value, "either"]
                    for damage, (_, values) in _damage_of(name).items()
                    for value in values
                ]
            )
        )

    checkpoints = [f"run/checkpoint-{step}/{name}" for step in (2, 4) for name in CHECKPOINT_FILES]
    run_files = [f"run/{name}" for name in RUN_FILES]
    student = [name for name in run_files if "student" in name]
    files = {
        **dict.fromkeys(("resume", "start again", "resume longer"), [*checkpoints, *checkpoints, *run_files]),
        "resume stopped": [*(name for name in checkpoints if "-2/" in name), *run_files[:3]],
        **dict.fromkeys(("evaluate", "evaluate run", "export", "teacher"), [*student, *student, *run_files]),
        **dict.fromkeys(("compare", "visualize"), run_files),
        "cached": ["cache/*"],
        "search": ["search/*"],
    }

    def of_command(command):
        changes = st.lists(damaged(files[command]), min_size=1, max_size=2, unique_by=lambda change: change[0])
        position = st.integers(0, 5)  # among the files of a cache or search
        return st.fixed_dictionaries({"command": st.just(command), "position": position, "changes": changes})

    often = ("resume", "resume stopped", "resume stopped", "evaluate", "compare", "cached")
    return st.sampled_from([*COMMANDS, *often]).flatmap(of_command)


def build(case: dict, ground: Path, folder: Path) -> Plan:
    """Copy the runs, damage files, and plan the command."""
    for name in ("run", "cache", "search"):
        shutil.copytree(ground / name, folder / name, symlinks=True)
    (folder / "run/notes.txt").write_text("own")
    (folder / "other").symlink_to(ground / "run")
    for name in ("images", "teacher"):
        (folder / name).symlink_to(ground / name)
    for name in ("run.yaml", "search.yaml"):
        shutil.copy(ground / name, folder)
    (folder / "cached.yaml").write_text((ground / "run.yaml").read_text().replace("output_dir: run", "output_dir: out"))
    if case["command"] == "resume stopped":
        for name in ("checkpoint-4", "student"):
            shutil.rmtree(folder / "run" / name)
    os.chdir(folder)
    for name, damage, value, _ in case["changes"]:
        path = folder / name
        if path.name == "*":
            found = sorted(file for file in path.parent.rglob("*") if file.is_file())
            path = found[case["position"] % len(found)]
        try:
            _damage_of(name if "*" not in name else path.name)[damage][0](path, value)
        except (KeyError, TypeError, AttributeError, ValueError):  # no JSON, or none of this shape
            path.write_bytes(b"damaged")
    said = strict_json(ground / "run/results.json")
    owned = {"cached": "out", "teacher": "out"}.get(case["command"], "run")
    return Plan(
        COMMANDS[case["command"]],
        expected_of(case["changes"]),
        lambda records: check(case["command"], folder / owned, said, records),
        own=("run", "cache", "search", "out"),
        lazy=True,  # a damaged part of a cache is found while training
    )


def check(command: str, output: Path, said: dict, records: type[Records]) -> str | None:
    """Return what is wrong with what a command left or measured, or None."""
    if command.startswith(("resume", "cached", "teacher", "start")):
        results = strict_json(output / "results.json")
        strict_json(output / "trainer_state.json")
        if command in ("resume", "resume stopped") and results["last"]["top1"] != said["last"]["top1"]:
            return "a resumed run ends with another top-1 than one that was not stopped"
        exported = results[results["exported"]]
        return check_top1(output / "student", exported["top1"], 1e-6, [])
    if command.startswith("evaluate") and records.eval_images != 16:
        return f"evaluated on {records.eval_images} images and not on 16"
    return None
